#include "cuda/selective_scan/selective_scan_launch.cuh"

WMK_SCAN_INSTANCE(template, forward, Scan16Double);
WMK_SCAN_INSTANCE(template, forward, Scan256Double);
