#include "cuda/selective_scan/selective_scan_launch.cuh"

WMK_SCAN_INSTANCE(template, backward, Scan16<WMK_BFLOAT16>);
WMK_SCAN_INSTANCE(template, backward, Scan16<WMK_FLOAT16>);
