#include "cuda/selective_scan/selective_scan_launch.cuh"

WMK_SCAN_INSTANCE(template, backward, Scan16Double);
WMK_SCAN_INSTANCE(template, backward, Scan256Double);
