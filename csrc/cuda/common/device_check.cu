// Whether this build runs on a GPU, by an empty kernel.
#include <cuda_runtime.h>

#include <string>

#include "cuda/common/device_check.h"
#include "include/wmkernels.h"

namespace {

__global__ void device_check_kernel() {}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string driver_reason(int64_t device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is installed";
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is too old: it supports CUDA " + version_text(driver) + ", this build needs CUDA " +
           version_text(CUDART_VERSION);
  }
  if (error != cudaSuccess) return wmk_cuda_error_name(error);
  if (device < 0 || device >= devices) {
    return "there is no GPU " + std::to_string(device) + " (the driver shows " + std::to_string(devices) + ")";
  }
  return "";
}

std::string kernel_reason(int device) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, device_check_kernel);
  if (error == cudaSuccess) return "";
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) {
    return wmk_cuda_error_name(error);
  }
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string architecture = std::to_string(major) + std::to_string(minor);
  return "this build has code for sm_" WMK_CUDA_ARCHITECTURES " and the GPU is sm_" + architecture +
         "; build it with WMKERNELS_CUDA_ARCHS=" + architecture;
}

std::string reason_for(int64_t device) {
  std::string reason = driver_reason(device);
  if (!reason.empty()) return reason;
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) error = cudaSetDevice(static_cast<int>(device));
  reason = error == cudaSuccess ? kernel_reason(static_cast<int>(device)) : wmk_cuda_error_name(error);
  if (current != device) cudaSetDevice(current);
  return reason;
}

}  // namespace

extern "C" const char* wmk_cuda_architectures() { return WMK_CUDA_ARCHITECTURES; }

extern "C" const char* wmk_cuda_error_name(int error) {
  thread_local std::string text;
  const cudaError_t code = static_cast<cudaError_t>(error);
  text = std::string(cudaGetErrorName(code)) + ": " + cudaGetErrorString(code);
  return text.c_str();
}

extern "C" const char* wmk_cuda_unavailable_reason(int64_t device) {
  thread_local std::string text;
  text = reason_for(device);
  cudaGetLastError();  // clears the error, which the next launch would report
  return text.c_str();
}
