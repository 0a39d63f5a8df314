#include "cuda/selective_scan/selective_scan_launch.cuh"

WMK_SCAN_INSTANCE(template, forward, Scan16<WMK_FLOAT32>);
