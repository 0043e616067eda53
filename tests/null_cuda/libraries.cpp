// cuBLAS, the driver as Triton asks it, and NVML, for the device in runtime.cpp: without their headers, most of whose
// arguments nothing here reads.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define C extern "C" __attribute__((visibility("default")))
C int null_cuda_launch(void* stream, const char* what);
C int null_cuda_processes(unsigned* pids, unsigned long long* bytes);
C unsigned long long null_cuda_total();
C int null_cuda_is_safe();
C int cublasCreate_v2(void*** handle) {
  if (!null_cuda_is_safe()) return 3;
  *handle = static_cast<void**>(calloc(1, sizeof(void*)));  // its stream
  return 0;
}
C int cublasDestroy_v2(void** handle) { return free(handle), 0; }
C int cublasSetStream_v2(void** handle, void* stream) { return *handle = stream, 0; }
C int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
C int cublasSetMathMode(void*, int) { return 0; }
C int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
C int cublasSetPointerMode_v2(void*, int) { return 0; }
C int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
#define MATMUL(name) \
  C int name(void** handle) { return null_cuda_launch(*handle, #name) ? 13 : 0; }
MATMUL(cublasGemmEx)
MATMUL(cublasGemmStridedBatchedEx)
MATMUL(cublasSgemm_v2)
MATMUL(cublasSgemmEx)
MATMUL(cublasSgemmStridedBatched)
MATMUL(cublasSgemv_v2)
MATMUL(cublasSdot_v2)
MATMUL(cublasDotEx)
MATMUL(cublasDgemm_v2)
MATMUL(cublasDgemmStridedBatched)
MATMUL(cublasDgemv_v2)
MATMUL(cublasDdot_v2)
C int cublasLtMatmul(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                     size_t, void* stream) {
  return null_cuda_launch(stream, "cublasLtMatmul") ? 13 : 0;
}
C size_t cublasLtGetVersion() { return 130100; }
#define MADE(name) C int name(void** made) { return *made = calloc(1, 256), 0; }
#define DONE(name) C int name(void*) { return 0; }
MADE(cublasLtMatmulDescCreate)
MADE(cublasLtMatmulPreferenceCreate)
MADE(cublasLtMatrixLayoutCreate)
C int cublasLtMatmulDescDestroy(void* made) { return free(made), 0; }
C int cublasLtMatmulPreferenceDestroy(void* made) { return free(made), 0; }
C int cublasLtMatrixLayoutDestroy(void* made) { return free(made), 0; }
DONE(cublasLtMatmulDescSetAttribute)
DONE(cublasLtMatmulPreferenceSetAttribute)
DONE(cublasLtMatrixLayoutSetAttribute)
C int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* count) {
  return *count = 1, 0;  // its result stays zero: success, no workspace
}

// The driver, as Triton asks it.
DONE(cuInit)
C int cuGetErrorString(int, const char** text) { return *text = "an error of the null device", 0; }
C int cuDeviceGet(int* device, int) { return *device = 0, 0; }
C int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
DONE(cuCtxSetCurrent)
C int cuDevicePrimaryCtxRetain(void** context, int) { return *context = (void*)1, 0; }
C int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
extern "C" int cudaDeviceGetAttribute(int*, int, int);
C int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}
C int cuModuleLoadData(void** module, const void*) { return *module = (void*)1, 0; }
C int cuModuleGetFunction(void** function, void*, const char* name) { return *function = strdup(name), 0; }
C int cuFuncGetAttribute(int* value, int attribute, void*) { return *value = attribute == 0 ? 1024 : 32, 0; }
DONE(cuFuncSetAttribute)
DONE(cuFuncSetCacheConfig)
C int cuCtxGetLimit(size_t* size, int) { return *size = 1 << 20, 0; }
DONE(cuCtxSetLimit)
C int cuOccupancyMaxActiveClusters(int* count, void*, void*) { return *count = 1, 0; }
DONE(cuTensorMapEncodeTiled)
C int cuPointerGetAttribute(void* data, int, unsigned long long pointer) { return *(unsigned long long*)data = pointer, 0; }
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
};
C int cuLaunchKernelEx(const LaunchConfig* how, void* function, void** arguments, void**) {
  if (!strcmp((const char*)function, "_test_kernel")) **(float**)arguments[0] = 1;  // as Triton is asked whether it works
  return null_cuda_launch(how->stream, (const char*)function);
}

// NVML.
DONE(nvmlInitWithFlags)
C int nvmlInit() { return 0; }
C int nvmlInit_v2() { return 0; }
C int nvmlShutdown() { return 0; }
C const char* nvmlErrorString(int) { return "an error of the null device"; }
C int nvmlSystemGetDriverVersion(char* text, unsigned size) { return snprintf(text, size, "580.0"), 0; }
C int nvmlDeviceGetCount_v2(unsigned* count) { return *count = 1, 0; }
C int nvmlDeviceGetHandleByIndex_v2(unsigned, void** handle) { return *handle = (void*)1, 0; }
C int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** handle) { return *handle = (void*)1, 0; }
C int nvmlDeviceGetName(void*, char* text, unsigned size) { return snprintf(text, size, "Null device"), 0; }
C int nvmlDeviceGetUUID(void*, char* text, unsigned size) { return snprintf(text, size, "GPU-0"), 0; }
C int nvmlDeviceGetCurrentClocksThrottleReasons(void*, unsigned long long* reasons) { return *reasons = 0, 0; }
C int nvmlDeviceGetMemoryInfo(void*, unsigned long long* info) {
  unsigned pids[64];
  unsigned long long bytes[64], used = 0;
  int count = null_cuda_processes(pids, bytes);
  for (int i = 0; i < count; ++i) used += bytes[i];
  info[0] = null_cuda_total();
  info[1] = info[0] - used;
  info[2] = used;
  return 0;
}
// What torch looks up and does without.
#define NONE(name) C int name() { return 1; }
C int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) { return *count = 0, 0; }
NONE(nvmlDeviceGetGpuFabricInfoV)
NONE(nvmlDeviceGetNvLinkRemoteDeviceType)
NONE(nvmlDeviceGetNvLinkRemotePciInfo_v2)
NONE(nvmlSystemGetCudaDriverVersion_v2)
struct ProcessInfo {
  unsigned pid;
  unsigned long long bytes;
  unsigned gpu, compute;
};
C int nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned* count, ProcessInfo* found) {
  unsigned pids[64];
  unsigned long long bytes[64];
  unsigned number = null_cuda_processes(pids, bytes), room = *count;
  *count = number;
  if (number > room) return 7;  // NVML_ERROR_INSUFFICIENT_SIZE
  for (unsigned i = 0; i < number; ++i) found[i] = {pids[i], bytes[i], 0xffffffff, 0xffffffff};
  return 0;
}
