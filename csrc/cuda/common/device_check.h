#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Compiled architectures, as "80,90".
const char* wmk_cuda_architectures(void);

// As "cudaErrorNoDevice: no CUDA-capable device is detected".
const char* wmk_cuda_error_name(int error);

#ifdef __cplusplus
}
#endif
