// A CUDA device that computes nothing: torch's own CUDA code runs, and its kernels do not.
//
// Preloaded in front of libcudart and libcublas; libcuda and libnvidia-ml are found by name. Memory is zero pages of the
// host that nothing is written to, so that a model of any size costs nothing. Kernels and matmuls are left out. Stream
// capture keeps CUDA's rules: what would end a capture on a device ends it here.
//
// NULL_CUDA_GIB: memory of the device, 80. NULL_CUDA_CAPABILITY: 90. NULL_CUDA_FAIL_AT: number of the node at which a
// capture fails. NULL_CUDA_LOG: file that says what was captured, and what ended a capture. NULL_CUDA_STATE: file that
// processes share, for what NVML tells of them.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#define C extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t kGiB = 1ull << 30, kContextBytes = 500ull << 20, kPageBytes = 2ull << 20;

struct Stream {
  bool invalid = false;
  unsigned long long capture = 0;  // 0: not capturing
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  pid_t thread = 0;
  size_t num_nodes = 0, num_unjoined = 0;
};
struct Event {
  unsigned long long capture = 0;
  Stream* stream = nullptr;
};
struct Process {
  pid_t pid;
  size_t bytes;
};

std::recursive_mutex lock;
std::map<char*, size_t> blocks, pinned;
std::set<Stream*> captures;  // origins
Stream legacy;
unsigned long long last_capture = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
using Guard = std::lock_guard<std::recursive_mutex>;

size_t total_bytes() {
  const char* gib = getenv("NULL_CUDA_GIB");
  return (gib ? strtoull(gib, nullptr, 10) : 80) * kGiB;
}

int capability() {
  const char* text = getenv("NULL_CUDA_CAPABILITY");
  return text ? atoi(text) : 90;
}

void note(const char* format, ...) {
  const char* path = getenv("NULL_CUDA_LOG");
  if (!path) return;
  FILE* file = fopen(path, "a");
  va_list args;
  va_start(args, format);
  fprintf(file, "%d: ", getpid());
  vfprintf(file, format, args);
  fputc('\n', file);
  va_end(args);
  fclose(file);
}

cudaError_t fail(cudaError_t error) { return last_error = error; }

Stream* of(cudaStream_t stream) {
  return reinterpret_cast<size_t>(stream) <= 2 ? &legacy : reinterpret_cast<Stream*>(stream);
}

// The processes on the device, shared among them and with what stands for NVML.
constexpr int kMaxProcesses = 64;
Process* processes() {
  static Process* table = [] {
    const char* path = getenv("NULL_CUDA_STATE");
    int file = path ? open(path, O_RDWR | O_CREAT, 0600) : -1;
    size_t size = kMaxProcesses * sizeof(Process);
    if (file < 0 || ftruncate(file, size)) return static_cast<Process*>(calloc(kMaxProcesses, sizeof(Process)));
    return static_cast<Process*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  }();
  for (int i = 0; i < kMaxProcesses; ++i)
    if (table[i].pid && kill(table[i].pid, 0)) table[i] = {};
  return table;
}

Process* own() {
  Process* table = processes();
  for (int i = 0; i < kMaxProcesses; ++i)
    if (table[i].pid == getpid()) return &table[i];
  for (int i = 0; i < kMaxProcesses; ++i)
    if (!table[i].pid) return table[i] = {getpid(), kContextBytes}, &table[i];
  abort();
}

size_t used_bytes() {
  size_t sum = 0;
  Process* table = processes();
  for (int i = 0; i < kMaxProcesses; ++i) sum += table[i].bytes;
  return sum;
}

// The capture that forbids the calling thread what may be unsafe, or null.
Stream* forbids() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return nullptr;
  for (Stream* stream : captures) {
    bool is_own = stream->thread == gettid() && stream->mode != cudaStreamCaptureModeRelaxed;
    bool is_global = stream->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (is_own || is_global) return stream;
  }
  return nullptr;
}

Stream* origin_of(unsigned long long capture) {
  for (Stream* stream : captures)
    if (stream->capture == capture) return stream;
  return nullptr;
}

cudaError_t ended(Stream* stream, const char* what, cudaError_t error = cudaErrorStreamCaptureUnsupported) {
  note("ended a capture: %s", what);
  stream->invalid = true;
  return fail(error);
}

cudaError_t safe(const char* what) {
  Guard guard(lock);
  Stream* stream = forbids();
  return stream ? ended(stream, what) : cudaSuccess;
}

cudaError_t launch(cudaStream_t handle, const char* what) {
  Guard guard(lock);
  Stream* stream = of(handle);
  if (stream->capture) {
    Stream* origin = origin_of(stream->capture);
    if (origin->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    const char* at = getenv("NULL_CUDA_FAIL_AT");
    if (at && ++origin->num_nodes == strtoull(at, nullptr, 10)) return ended(origin, "as asked");
    if (!at) ++origin->num_nodes;
    return cudaSuccess;
  }
  for (Stream* each : captures)
    if (each->thread == gettid()) note("beside a capture: %s", what);
  return cudaSuccess;
}

bool is_in(const std::map<char*, size_t>& table, const void* pointer) {
  auto at = table.upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
  if (at == table.begin()) return false;
  --at;
  return pointer < at->first + at->second;
}

cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t handle) {
  Guard guard(lock);
  if (of(handle)->capture) {
    bool is_pageable = false;
    for (const void* pointer : {static_cast<const void*>(to), from})
      is_pageable |= !is_in(blocks, pointer) && !is_in(pinned, pointer);
    if (is_pageable) return ended(origin_of(of(handle)->capture), "a copy of pageable memory");
    return launch(handle, "copy");
  }
  launch(handle, "copy");
  // What the host writes is left out: it would be garbage to kernels that never ran on it.
  if (!is_in(blocks, to)) memmove(to, from, size);
  // One byte is a question, as whether all numbers are finite: yes.
  if (!is_in(blocks, to) && is_in(blocks, from) && size == 1) *static_cast<char*>(to) = 1;
  return cudaSuccess;
}

int any_driver_call() { return 0; }

}  // namespace

// Memory.

C cudaError_t cudaMalloc(void** pointer, size_t size) {
  if (cudaError_t error = safe("cudaMalloc")) return error;
  Guard guard(lock);
  size_t rounded = (size + kPageBytes - 1) / kPageBytes * kPageBytes;
  if (used_bytes() + rounded > total_bytes()) return fail(cudaErrorMemoryAllocation);
  void* made = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  madvise(made, rounded, MADV_DONTDUMP);
  blocks[static_cast<char*>(made)] = rounded;
  own()->bytes += rounded;
  *pointer = made;
  return cudaSuccess;
}

C cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  if (cudaError_t error = safe("cudaFree")) return error;
  Guard guard(lock);
  auto at = blocks.find(static_cast<char*>(pointer));
  if (at == blocks.end()) return fail(cudaErrorInvalidValue);
  munmap(at->first, at->second);
  own()->bytes -= at->second;
  blocks.erase(at);
  return cudaSuccess;
}

C cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  if (cudaError_t error = safe("cudaHostAlloc")) return error;
  Guard guard(lock);
  *pointer = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  pinned[static_cast<char*>(*pointer)] = size;
  return cudaSuccess;
}

C cudaError_t cudaFreeHost(void* pointer) {
  Guard guard(lock);
  pinned.erase(static_cast<char*>(pointer));
  free(pointer);
  return cudaSuccess;
}

C cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  Guard guard(lock);
  own();
  *total = total_bytes();
  *free_bytes = *total - used_bytes();
  return cudaSuccess;
}

C cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (cudaError_t error = safe("cudaMemcpy")) return error;
  return copy(to, from, size, nullptr);
}

C cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, size, stream);
}

C cudaError_t cudaMemset(void*, int, size_t) { return safe("cudaMemset"); }
C cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t stream) { return launch(stream, "memset"); }

C cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  Guard guard(lock);
  *found = {};
  found->type = is_in(blocks, pointer)   ? cudaMemoryTypeDevice
                : is_in(pinned, pointer) ? cudaMemoryTypeHost
                                         : cudaMemoryTypeUnregistered;
  found->devicePointer = found->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

// The device.

C cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
C cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
C cudaError_t cudaSetDevice(int) { return cudaSuccess; }
C cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
C cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
C cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
C cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
C cudaError_t cudaPeekAtLastError() { return last_error; }

C cudaError_t cudaDeviceSynchronize() {
  Guard guard(lock);
  for (Stream* stream : captures) return ended(stream, "cudaDeviceSynchronize");
  return cudaSuccess;
}

C cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "Null device");
  found->totalGlobalMem = total_bytes();
  found->major = capability() / 10;
  found->minor = capability() % 10;
  found->multiProcessorCount = 132;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472;
  found->l2CacheSize = 50 << 20;
  found->memoryBusWidth = 5120;
  found->unifiedAddressing = found->concurrentKernels = found->canMapHostMemory = 1;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  return cudaSuccess;
}

C cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  cudaDeviceProp found;
  cudaGetDeviceProperties(&found, 0);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *value = found.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = found.minor; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

C cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  return snprintf(text, size, "0000:00:00.0"), cudaSuccess;
}
C const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    default: return "an error of the null device";
  }
}
C const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
C cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(any_driver_call);
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Streams and events.

C cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return *stream = reinterpret_cast<cudaStream_t>(new Stream), cudaSuccess;
}
C cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
C cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
C cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
C cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
C cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Guard guard(lock);
  return of(stream)->capture ? ended(origin_of(of(stream)->capture), "cudaStreamQuery") : cudaSuccess;
}
C cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Guard guard(lock);
  return of(stream)->capture ? ended(origin_of(of(stream)->capture), "cudaStreamSynchronize") : cudaSuccess;
}
C cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
C cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
C cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete reinterpret_cast<Event*>(event), cudaSuccess; }
C cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Guard guard(lock);
  *reinterpret_cast<Event*>(event) = {of(stream)->capture, of(stream)};
  return cudaSuccess;
}
C cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
C cudaError_t cudaEventQuery(cudaEvent_t event) {
  Guard guard(lock);
  Stream* origin = origin_of(reinterpret_cast<Event*>(event)->capture);
  return origin ? ended(origin, "cudaEventQuery of a captured event") : safe("cudaEventQuery");
}
C cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
C cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }
C cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Guard guard(lock);
  Stream* stream = of(handle);
  Event* awaited = reinterpret_cast<Event*>(event);
  Stream* origin = origin_of(awaited->capture);
  if (stream->capture && !origin)
    return ended(origin_of(stream->capture), "waits for work outside", cudaErrorStreamCaptureIsolation);
  if (!origin || stream == awaited->stream) return cudaSuccess;
  if (!stream->capture) {
    stream->capture = awaited->capture;
    ++origin->num_unjoined;
  } else if (stream == origin && awaited->stream->capture) {
    awaited->stream->capture = 0;
    --origin->num_unjoined;
  }
  return cudaSuccess;
}
C cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  return callback(stream, cudaSuccess, data), cudaSuccess;
}
C cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) { return function(data), cudaSuccess; }

// Capture.

C cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
C cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Guard guard(lock);
  unsigned long long capture = of(handle)->capture;
  *status = !capture                         ? cudaStreamCaptureStatusNone
            : origin_of(capture)->invalid    ? cudaStreamCaptureStatusInvalidated
                                             : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
C cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
    cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* num_nodes) {
  cudaStreamIsCapturing(handle, status);
  if (id) *id = of(handle)->capture;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (num_nodes) *num_nodes = 0;
  return cudaSuccess;
}
C cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Guard guard(lock);
  Stream* stream = of(handle);
  if (stream == &legacy || stream->capture) return fail(cudaErrorStreamCaptureUnsupported);
  stream->capture = ++last_capture;
  stream->mode = mode;
  stream->thread = gettid();
  stream->num_nodes = stream->num_unjoined = 0;
  stream->invalid = false;
  captures.insert(stream);
  return cudaSuccess;
}
C cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Guard guard(lock);
  Stream* stream = of(handle);
  if (!captures.count(stream)) return fail(cudaErrorIllegalState);
  captures.erase(stream);
  stream->capture = 0;
  *graph = nullptr;
  if (stream->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  if (stream->num_unjoined) return note("unjoined"), fail(cudaErrorStreamCaptureUnjoined);
  note("captured %zu nodes", stream->num_nodes);
  *graph = reinterpret_cast<cudaGraph_t>(new size_t(stream->num_nodes));
  return cudaSuccess;
}
C cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = *reinterpret_cast<size_t*>(graph), cudaSuccess;
}
C cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new size_t(*reinterpret_cast<size_t*>(graph)));
  return safe("cudaGraphInstantiate");
}
C cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete reinterpret_cast<size_t*>(graph), cudaSuccess; }
C cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return delete reinterpret_cast<size_t*>(graph), safe("cudaGraphExecDestroy");
}
C cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) { return launch(stream, "graph"); }
C cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  return *count = 0, cudaSuccess;
}

// Kernels.

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static thread_local Configuration pushed;
C unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  return pushed = {grid, block, shared, stream}, 0;
}
C cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
static std::map<const void*, const char*> names;
C cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* entry) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(entry)), cudaSuccess;
}
static cudaError_t launch_kernel(const void* entry, dim3 grid, dim3 block, cudaStream_t stream) {
  Guard guard(lock);
  auto at = names.find(entry);
  const char* name = at == names.end() ? "a kernel" : at->second;
  size_t threads = size_t(block.x) * block.y * block.z;
  if (!threads || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) {
    note("invalid configuration: %s", name);
    return fail(cudaErrorInvalidConfiguration);
  }
  return launch(stream, name);
}
C cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
  return launch_kernel(kernel, grid, block, stream);
}
C cudaError_t cudaLaunchKernel(const void* entry, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
  return launch_kernel(entry, grid, block, stream);
}
C cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* entry, void**) {
  return launch_kernel(entry, how->gridDim, how->blockDim, how->stream);
}
C void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
C void __cudaRegisterFatBinaryEnd(void**) {}
C void __cudaUnregisterFatBinary(void**) {}
C void __cudaRegisterFunction(
    void**, const char* entry, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names[entry] = name;
}
C void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
C cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 64;
  found->binaryVersion = found->ptxVersion = capability();
  found->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
C cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
C cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  return *n = 2, cudaSuccess;
}
C cudaError_t cudaGetSymbolAddress(void** pointer, const void*) { return cudaMalloc(pointer, 64); }
C cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
C cudaError_t cudaProfilerStart() { return cudaSuccess; }
C cudaError_t cudaProfilerStop() { return cudaSuccess; }

// What libraries.cpp asks of this file.

C int null_cuda_launch(void* stream, const char* what) { return launch(static_cast<cudaStream_t>(stream), what); }
C int null_cuda_is_safe() { return !safe("cublasCreate"); }
C unsigned long long null_cuda_total() { return total_bytes(); }
C int null_cuda_processes(unsigned* pids, unsigned long long* bytes) {
  Process* table = processes();
  int count = 0;
  for (int i = 0; i < kMaxProcesses; ++i)
    if (table[i].pid) pids[count] = table[i].pid, bytes[count++] = table[i].bytes;
  return count;
}
