// Of the CUDA build, beside the API of wmkernels.h.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// The architectures with machine code in this build, as "80,90".
const char* wmk_cuda_architectures(void);

// A cudaError_t in words, as "cudaErrorNoDevice: no CUDA-capable device is detected".
const char* wmk_cuda_error_name(int error);

#ifdef __cplusplus
}
#endif
