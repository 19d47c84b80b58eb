// What racecheck understands of the pipeline in `tiled_code`: a ring of slots, each with a pair of mbarriers.
//
//     nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a -o announce announce.cu
//     compute-sanitizer --tool racecheck ./announce MODE
//
// Every thread copies 16 bytes per stage into a slot and reads those of a thread of another warp. All modes but `unwaited`
// order each copy before its reads and each read before the next copy into the slot:
//
//     groups     cp.async, wait_group, __syncthreads
//     stores     ordinary stores, mbarrier.arrive by every writer; `empty` by every reader
//     waited     cp.async, wait_all, then as `stores`
//     spoken     as `waited`, but one lane of a warp speaks for the others after __syncwarp on `empty`
//     told       cp.async, cp.async.mbarrier.arrive.noinc; `empty` as `stores`. PTX ISA: the arrive is triggered when all
//                prior cp.async of the thread have completed
//     announced  as `told`, `empty` as `spoken`: what the kernels do
//     unwaited   as `waited` without waiting for `empty`: a race
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cuda_runtime.h>

constexpr int kThreads = 256, kSlots = 3, kStages = 24;
enum Mode { groups, stores, waited, spoken, told, announced, unwaited };
const char* const kNames[] = {"groups", "stores", "waited", "spoken", "told", "announced", "unwaited"};

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory");
}

__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ void wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{ .reg .pred p; again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1; @p bra.uni done;\n"
      "bra.uni again; done: }" ::"r"(address(barrier)), "r"(phase) : "memory");
}

template <int M>
__device__ void put(uint4* slot, const uint4* source, uint64_t* full) {
  uint4* place = slot + threadIdx.x;
  if (M == stores) {
    *place = source[threadIdx.x];
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(place)), "l"(source + threadIdx.x) : "memory");
  }
  if (M == groups) {
    asm volatile("cp.async.commit_group;" ::: "memory");
  } else if (M == announced || M == told) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address(full)) : "memory");
  } else {
    if (M != stores) asm volatile("cp.async.wait_all;" ::: "memory");
    arrive(full);
  }
}

template <int M>
__global__ void ring(const uint4* source, uint32_t* sums) {
  __shared__ uint4 slots[kSlots][kThreads];
  __shared__ uint64_t full[kSlots], empty[kSlots];
  constexpr bool warps = M == spoken || M == announced;
  const int t = threadIdx.x, other = (t + 32) % kThreads;
  if (t == 0)
    for (int s = 0; s < kSlots; ++s) init(full + s, kThreads), init(empty + s, warps ? kThreads / 32 : kThreads);
  __syncthreads();
  for (int i = 0; i < kSlots - 1; ++i) put<M>(slots[i], source + i * kThreads, full + i);
  uint32_t sum = 0;
  for (int i = 0; i < kStages; ++i) {
    const int slot = i % kSlots, next = i + kSlots - 1, following = next % kSlots;
    if (M == groups) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kSlots - 2) : "memory");
      __syncthreads();
    } else {
      wait(full + slot, i / kSlots % 2);
    }
    const uint4 v = slots[slot][other];
    sum += v.x + 3 * v.y + 5 * v.z + 7 * v.w;
    if (M != groups) {
      if (warps) __syncwarp();
      if (!warps || t % 32 == 0) arrive(empty + slot);
      if (warps) __syncwarp();
    }
    if (next < kStages) {
      if (M != groups && M != unwaited && i > 0) wait(empty + following, (i - 1) / kSlots % 2);
      put<M>(slots[following], source + next * kThreads, full + following);
    } else if (M == groups) {
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
  }
  sums[t] = sum;
}

int main(int argc, char** argv) {
  void (*const kernels[])(const uint4*, uint32_t*) = {ring<groups>, ring<stores>,    ring<waited>,  ring<spoken>,
                                                      ring<told>,   ring<announced>, ring<unwaited>};
  int mode = -1;
  for (int i = 0; i < 7; ++i)
    if (argc > 1 && !std::strcmp(argv[1], kNames[i])) mode = i;
  if (mode < 0) return std::fprintf(stderr, "usage: announce groups|stores|waited|spoken|told|announced|unwaited\n"), 2;
  static uint4 host[kStages * kThreads];
  static uint32_t sums[kThreads];
  uint32_t state = 1;
  for (uint4& v : host) {
    uint32_t* word = &v.x;
    for (int w = 0; w < 4; ++w) word[w] = state = state * 1664525u + 1013904223u;
  }
  uint4* source;
  uint32_t* out;
  cudaMalloc(&source, sizeof host);
  cudaMalloc(&out, sizeof sums);
  cudaMemcpy(source, host, sizeof host, cudaMemcpyHostToDevice);
  kernels[mode]<<<1, kThreads>>>(source, out);
  cudaMemcpy(sums, out, sizeof sums, cudaMemcpyDeviceToHost);
  if (const cudaError_t error = cudaGetLastError()) return std::fprintf(stderr, "%s\n", cudaGetErrorString(error)), 1;
  int wrong = 0;
  for (int t = 0; t < kThreads; ++t) {
    uint32_t want = 0;
    for (int i = 0; i < kStages; ++i) {
      const uint4 v = host[i * kThreads + (t + 32) % kThreads];
      want += v.x + 3 * v.y + 5 * v.z + 7 * v.w;
    }
    wrong += sums[t] != want;
  }
  std::printf("%s: %d of %d sums wrong\n", kNames[mode], wrong, kThreads);
  return 0;
}
