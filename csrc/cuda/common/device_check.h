// What the build knows about its CUDA part, beside the API of wmkernels.h.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// The architectures that this build has machine code for, comma-separated, as "80,90".
const char* wmk_cuda_architectures(void);

// The name of a cudaError_t and what it means, as "cudaErrorNoDevice: no CUDA-capable device is detected".
const char* wmk_cuda_error_name(int error);

#ifdef __cplusplus
}
#endif
