#include "selective_scan_launch.cuh"

template int wmk::launch_forward<wmk::Scan8>(const wmk_selective_scan&, const wmk::ScanPlan&);
template int wmk::launch_forward<wmk::Scan16>(const wmk_selective_scan&, const wmk::ScanPlan&);
