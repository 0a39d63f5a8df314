#include "selective_scan_launch.cuh"

template int wmk::launch_backward<wmk::Scan16Double>(const wmk_selective_scan&, const wmk::ScanPlan&);
template int wmk::launch_backward<wmk::Scan256Double>(const wmk_selective_scan&, const wmk::ScanPlan&);
