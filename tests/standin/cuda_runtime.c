#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cuda_runtime_api.h>

#define DEVICES 16
static __thread int current;
static __thread cudaError_t last;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used[DEVICES];
struct block { void *at; size_t size; int device; struct block *next; };
static struct block *blocks;

static long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? strtol(text, NULL, 0) : otherwise;
}
static int devices(void) { return (int)setting("STANDIN_DEVICES", 1); }
static size_t memory(void) { return (size_t)setting("STANDIN_MEMORY", 4L << 30); }
static cudaError_t told(cudaError_t error) { if (error) last = error; return error; }

cudaError_t cudaGetDeviceCount(int *count) { *count = devices(); return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return told(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  long cc = setting("STANDIN_CAPABILITY", 90);
  memset(found, 0, sizeof *found);
  const char *name = getenv("STANDIN_NAME");
  snprintf(found->name, sizeof found->name, "%s", name ? name : "stand-in GPU");
  found->totalGlobalMem = memory();
  found->major = (int)(cc / 10);
  found->minor = (int)(cc % 10);
  found->multiProcessorCount = (int)setting("STANDIN_MULTIPROCESSORS", 132);
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = (size_t)setting("STANDIN_SHARED_MEMORY", 232448);
  found->sharedMemPerMultiprocessor = found->sharedMemPerBlockOptin + 1024;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->l2CacheSize = 50 << 20;
  found->pciBusID = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device) {
  struct cudaDeviceProp found;
  cudaGetDeviceProperties(&found, device);
  switch (what) {
    case cudaDevAttrMultiProcessorCount: *value = found.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = found.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = found.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)found.sharedMemPerBlockOptin; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device) { snprintf(out, size, "0000:%02x:00.0", device + 1); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = a != b; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }

cudaError_t cudaMalloc(void **at, size_t size) {
  pthread_mutex_lock(&lock);
  int device = current;
  void *found = NULL;
  if (used[device] + size <= memory()) {
    found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) found = NULL;
  }
  if (found) {
    struct block *one = malloc(sizeof *one);
    *one = (struct block){found, size, device, blocks};
    blocks = one;
    used[device] += size;
  }
  pthread_mutex_unlock(&lock);
  *at = found;
  return found ? cudaSuccess : told(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void *at) {
  if (!at) return cudaSuccess;
  pthread_mutex_lock(&lock);
  for (struct block **link = &blocks; *link; link = &(*link)->next) {
    struct block *one = *link;
    if (one->at == at) {
      *link = one->next;
      used[one->device] -= one->size;
      munmap(one->at, one->size);
      free(one);
      break;
    }
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_, size_t *total) { *total = memory(); *free_ = memory() - used[current]; return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *at) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&lock);
  for (struct block *one = blocks; one; one = one->next)
    if ((char *)at >= (char *)one->at && (char *)at < (char *)one->at + one->size) {
      found->type = one->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
      found->device = one->device < 0 ? 0 : one->device;
      found->devicePointer = (void *)at;
      if (one->device < 0) found->hostPointer = (void *)at;
    }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **at, size_t size, unsigned flags) {
  if (posix_memalign(at, 4096, size)) return told(cudaErrorMemoryAllocation);
  struct block *one = malloc(sizeof *one);
  pthread_mutex_lock(&lock);
  *one = (struct block){*at, size, -1, blocks};
  blocks = one;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *at) {
  pthread_mutex_lock(&lock);
  for (struct block **link = &blocks; *link; link = &(*link)->next)
    if ((*link)->at == at) { struct block *one = *link; *link = one->next; free(one); break; }
  pthread_mutex_unlock(&lock);
  free(at);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void *at, size_t size, unsigned flags) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *at) { return cudaSuccess; }

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { memmove(to, from, size); return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) { memmove(to, from, size); return cudaSuccess; }
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) { memmove(to, from, size); return cudaSuccess; }
cudaError_t cudaMemset(void *at, int value, size_t size) { memset(at, value, size); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t stream) { memset(at, value, size); return cudaSuccess; }

static uintptr_t handles = 0x1000;
static void *handle(void) { return (void *)__sync_add_and_fetch(&handles, 16); }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { *s = handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { *s = handle(); return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *found) { *found = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *found, unsigned long long *id, cudaGraph_t *g, const cudaGraphNode_t **n, const cudaGraphEdgeData **e, size_t *c) { *found = cudaStreamCaptureStatusNone; if (id) *id = 0; if (c) *c = 0; return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = handle(); return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 0.001f; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { cudaError_t was = last; last = cudaSuccess; return was; }
cudaError_t cudaPeekAtLastError(void) { return last; }

static cudaError_t refused(void) { return told(cudaErrorInvalidDeviceFunction); }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **args, size_t shared, cudaStream_t s) { return refused(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args) { return refused(); }
cudaError_t __cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **args, size_t shared, cudaStream_t s) { return refused(); }
#include <dlfcn.h>
static int unavailable(void) { return 801; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **at, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
  *at = (void *)unavailable;
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

#define REFUSED(name) int name(void) { return 801; }
REFUSED(cuCtxFromGreenCtx)
REFUSED(cuCtxPopCurrent)
REFUSED(cuCtxPushCurrent)
REFUSED(cuCtxSetCurrent)
REFUSED(cuDevResourceGenerateDesc)
REFUSED(cuDevSmResourceSplitByCount)
REFUSED(cuDeviceGetDevResource)
REFUSED(cuDeviceGetUuid)
REFUSED(cuDevicePrimaryCtxRetain)
REFUSED(cuFuncGetAttribute)
REFUSED(cuFuncSetAttribute)
REFUSED(cuFuncSetCacheConfig)
REFUSED(cuGetErrorName)
REFUSED(cuGetErrorString)
REFUSED(cuGreenCtxCreate)
REFUSED(cuGreenCtxDestroy)
REFUSED(cuGreenCtxStreamCreate)
REFUSED(cuLaunchCooperativeKernel)
REFUSED(cuLaunchKernel)
REFUSED(cuLinkAddData_v2)
REFUSED(cuLinkAddData)
REFUSED(cuLinkComplete)
REFUSED(cuLinkCreate_v2)
REFUSED(cuLinkCreate)
REFUSED(cuLogsRegisterCallback)
REFUSED(cuLogsUnregisterCallback)
REFUSED(cuMemExportToShareableHandle)
REFUSED(cuMemGetAddressRange)
REFUSED(cuMemGetAddressRange_v2)
REFUSED(cuMemGetAllocationPropertiesFromHandle)
REFUSED(cuMemImportFromShareableHandle)
REFUSED(cuMemRetainAllocationHandle)
REFUSED(cuMemsetD32Async)
REFUSED(cuModuleGetFunction)
REFUSED(cuModuleLoad)
REFUSED(cuModuleLoadData)
REFUSED(cuModuleLoadDataEx)
REFUSED(cuModuleUnload)
REFUSED(cuMulticastAddDevice)
REFUSED(cuMulticastBindMem)
REFUSED(cuMulticastCreate)
REFUSED(cuMulticastUnbind)
REFUSED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSED(cuPointerGetAttribute)
REFUSED(cuStreamWriteValue32)
REFUSED(cuTensorMapEncodeTiled)
REFUSED(cuLaunchKernelEx)
REFUSED(cuDeviceTotalMem_v2)
REFUSED(cuDeviceGetName)
REFUSED(cuDeviceComputeCapability)
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = devices(); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)(uintptr_t)(current + 1); return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetDevice(int *device) { *device = current; return 0; }

/* Memory that is mapped apart from its addresses, as torch_memory_saver has it. It is a file without a name, and holds
   anything but zeros, so that whoever reads what a pause has lost is found out. */
#define GARBAGE 0x5A
#define RDMA_SUPPORTED 110
#define CALL_FAILED 1
#define OUT_OF_MEMORY 2
struct physical { int file; size_t size; int device; };
struct wanted { int type, shareable, where, device; };

int cuDeviceGetAttribute(int *value, int what, int device) {
  *value = 0;
  return what == RDMA_SUPPORTED ? 0 : 801;
}
int cuMemGetAllocationGranularity(size_t *size, const struct wanted *what, int which) { *size = 2 << 20; return 0; }
int cuMemAddressReserve(uintptr_t *at, size_t size, size_t alignment, uintptr_t hint, unsigned long long flags) {
  void *found = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *at = (uintptr_t)found;
  return found == MAP_FAILED ? OUT_OF_MEMORY : 0;
}
int cuMemAddressFree(uintptr_t at, size_t size) { return munmap((void *)at, size) ? CALL_FAILED : 0; }
int cuMemCreate(struct physical **handle, size_t size, const struct wanted *what, unsigned long long flags) {
  pthread_mutex_lock(&lock);
  int fits = used[what->device] + size <= memory();
  if (fits) used[what->device] += size;
  pthread_mutex_unlock(&lock);
  if (!fits) return OUT_OF_MEMORY;
  struct physical *one = malloc(sizeof *one);
  *one = (struct physical){memfd_create("device memory", 0), size, what->device};
  if (ftruncate(one->file, (off_t)size)) return CALL_FAILED;
  void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, one->file, 0);
  if (at == MAP_FAILED) return OUT_OF_MEMORY;
  memset(at, GARBAGE, size);
  munmap(at, size);
  *handle = one;
  return 0;
}
int cuMemRelease(struct physical *handle) {
  pthread_mutex_lock(&lock);
  used[handle->device] -= handle->size;
  pthread_mutex_unlock(&lock);
  close(handle->file);
  free(handle);
  return 0;
}
int cuMemMap(uintptr_t at, size_t size, size_t offset, struct physical *handle, unsigned long long flags) {
  if (mmap((void *)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, handle->file, (off_t)offset) == MAP_FAILED) return CALL_FAILED;
  struct block *one = malloc(sizeof *one);
  pthread_mutex_lock(&lock);
  *one = (struct block){(void *)at, size, handle->device, blocks};
  blocks = one;
  pthread_mutex_unlock(&lock);
  return 0;
}
int cuMemSetAccess(uintptr_t at, size_t size, const void *whose, size_t count) {
  return mprotect((void *)at, size, PROT_READ | PROT_WRITE) ? CALL_FAILED : 0;
}
int cuMemUnmap(uintptr_t at, size_t size) {
  pthread_mutex_lock(&lock);
  for (struct block **link = &blocks; *link; link = &(*link)->next)
    if ((*link)->at == (void *)at) { struct block *one = *link; *link = one->next; free(one); break; }
  pthread_mutex_unlock(&lock);
  void *left = mmap((void *)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return left == MAP_FAILED ? CALL_FAILED : 0;
}
cudaError_t cudaMallocHost(void **at, size_t size) { return cudaHostAlloc(at, size, 0); }
