// Blocks of a cluster on a CPU, a thread of the operating system for each of theirs: what kernels that share rows are
// written in. Copies, products and stores take effect at once; barriers count as the PTX ISA says and abort on misuse.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

using std::max;
using std::min;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef _Float16 half;
struct Index { int x, y, z; };
thread_local Index threadIdx, blockIdx;

[[noreturn]] static void fail(const char* what) { fprintf(stderr, "block %d,%d thread %d: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what); abort(); }
static void require(bool condition, const char* what) { if (!condition) fail(what); }

// An mbarrier: a phase ends when all arrivals and bytes it expects have come.
struct Phases {
  std::mutex lock;
  std::atomic<int> phase{0};
  int count = 0, pending = 0;
  long bytes = 0;
  void settle() { if (!pending && !bytes) { pending = count; phase++; phase.notify_all(); } }
  void start(int arrivals) { count = pending = arrivals; }
  void arrive(long expected) {
    std::lock_guard guard(lock);
    require(count && pending, "arrives at a barrier that expects nobody");
    bytes += expected; pending--; settle();
  }
  void complete(long arrived) {
    std::lock_guard guard(lock);
    require(count, "bytes for a barrier that was not started");
    bytes -= arrived; settle();
  }
  void wait(int parity) { for (int now; ((now = phase) & 1) == parity;) phase.wait(now); }
};

typedef std::barrier<> Meeting;
struct Warp { Meeting meeting{32}; uint words[32]; };
struct Group { Meeting meeting{128}; uint operand[128][4]; };
const int MOST = 232448, LIMIT = 8;
struct Block {
  alignas(1024) uchar shared[MOST];
  std::unique_ptr<Phases[]> barriers{new Phases[MOST / 8]};
  std::deque<Warp> warps;
  std::deque<Group> groups;
  std::unique_ptr<Meeting> named;
  std::atomic<int> alive;
};
static std::vector<std::unique_ptr<Block>> cluster;
static std::unique_ptr<Meeting> everyone;
static int shared_size, named_threads;
thread_local int rank;
thread_local std::optional<Meeting::arrival_token> arrived;

static Block& here() { return *cluster[rank]; }
static Warp& warp() { return here().warps[threadIdx.x / 32]; }
static void warp_sync() { warp().meeting.arrive_and_wait(); }

// Addresses: an offset, and from bit 24 on 1 + the rank of another block.
static Block& owner(uint address) {
  Block& block = *cluster[address >> 24 ? (address >> 24) - 1 : rank];
  require(block.alive, "access to a block that has ended");
  return block;
}
static uchar* place(uint address, int size) {
  uint offset = address & 0xffffff;
  require(offset % size == 0 && offset + size <= (uint)shared_size, "address in shared memory");
  return owner(address).shared + offset;
}
static Phases& phases(uint address) { return place(address, 8), owner(address).barriers[(address & 0xffffff) / 8]; }
static uint swizzled(uint address) { return address ^ (address >> 7 & 7) << 4; }

// Tensor copies. `encode_tensor_map` stands for the driver's function.
typedef uint64_t cuuint64_t;
typedef uint32_t cuuint32_t;
typedef int CUresult, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill;
enum { CUDA_SUCCESS, CU_TENSOR_MAP_DATA_TYPE_UINT8 = 1, CU_TENSOR_MAP_DATA_TYPE_UINT64 = 8 };
struct CUtensorMap { const uchar* base; int rank, size, box[3]; long extents[3], strides[3]; bool swizzle; };
static CUresult cuTensorMapEncodeTiled(CUtensorMap* map, int size, int rank, const void* base, const cuuint64_t* extents,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, int, int swizzle, int, int) {
  *map = {(const uchar*)base, rank, size, {1, 1, 1}, {1, 1, 1}, {size}, swizzle == 3};
  for (int i = 0; i < rank; i++) {
    map->extents[i] = extents[i]; map->box[i] = box[i];
    if (i) map->strides[i] = strides[i - 1];
    if (box[i] > 256 || (i && strides[i - 1] % 16)) return 1;
  }
  int row = map->box[0] * size;
  return row % 16 || (map->swizzle && row > 128) || (uintptr_t)base % 16;
}
static void tensor_copy(uint to, const void* described, std::vector<int> at, uint barrier, uint blocks) {
  const CUtensorMap& map = *(const CUtensorMap*)described;
  require((int)at.size() == map.rank && to % 128 == 0, "tensor copy");
  at.resize(3);
  int row = map.box[0] * map.size;
  for (uint r = 0; r < cluster.size(); r++) {
    if (!(blocks >> r & 1)) continue;
    require(cluster[r]->alive, "copy to a block that has ended");
    for (int k = 0; k < map.box[2]; k++) for (int j = 0; j < map.box[1]; j++) for (int i = 0; i < row; i += 16) {
      uint address = to + (k * map.box[1] + j) * row + i;
      uchar* target = cluster[r]->shared + (map.swizzle ? swizzled(address) : address);
      long x = at[0] + i / map.size, y = at[1] + j, z = at[2] + k;
      memset(target, 0, 16);
      if (x < map.extents[0] && y < map.extents[1] && z < map.extents[2])
        memcpy(target, map.base + x * map.size + y * map.strides[1] + z * map.strides[2], min(16L, (map.extents[0] - x) * map.size));
    }
    cluster[r]->barriers[barrier / 8].complete((long)row * map.box[1] * map.box[2]);
  }
}

// wgmma m64nNk32 of int8: weights from registers, x by a descriptor with 128-byte swizzle.
static void wgmma(std::vector<uint*> sums, const uint (&operand)[4], uint64_t descriptor, int keep) {
  Group& group = here().groups[threadIdx.x / 128];
  int thread = threadIdx.x % 128, g = thread % 32 / 4, t = thread % 4, first = thread / 32 * 32 + g * 4;
  memcpy(group.operand[thread], operand, 16);
  group.meeting.arrive_and_wait();
  require(descriptor >> 62 == 1 && (descriptor >> 32 & 0x3fff) == 64, "descriptor");
  for (uint c = 0; c < sums.size(); c++) {
    uint n = c / 4 * 8 + 2 * t + c % 2, a = c / 2 % 2, total = keep ? *sums[c] : 0;
    for (int k = 0; k < 32; k++) {
      uint address = (descriptor & 0x3fff) * 16 + n / 8 * 1024 + n % 8 * 128 + k;
      int w = (int8_t)(group.operand[first + k % 16 / 4][k / 16 * 2 + a] >> k % 4 * 8);
      total += w * (int8_t)*place(swizzled(address), 1);
    }
    *sums[c] = total;
  }
  group.meeting.arrive_and_wait();
}
static void store_transposed(uint address, const uint (&words)[4]) {
  warp().words[threadIdx.x % 32] = address;
  warp_sync();
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 8; i++) {
    ushort value = words[i / 2] >> i % 2 * 16;
    memcpy(place(warp().words[i / 2 * 8 + 2 * t + i % 2], 16) + 2 * g, &value, 2);
  }
  warp_sync();
}
static uint pair(float high, float low) {
  half both[2] = {(half)low, (half)high};
  uint word;
  return memcpy(&word, both, 4), word;
}
static int __shfl_sync(uint, int value, int, int) { return value; }
struct Message { template <typename T> Message& operator<<(const T&) { return *this; } };
#define TVM_FFI_CHECK(condition, kind) if (!(condition)) fail("tensor map"); Message()
static void cuGetErrorString(int, const char**) {}
static void TVMFFIErrorSetRaisedFromCStr(const char*, const char* message) { fail(message); }

// All clusters of a grid, one after the other; they may take five minutes.
template <typename Kernel>
static void launch(Index grid, Index size, int threads, int multiply, int shared, Kernel kernel) {
  shared_size = shared; named_threads = multiply;
  std::timed_mutex running;
  running.lock();
  std::thread watch([&] { require(running.try_lock_for(std::chrono::minutes(5)), "blocks wait for each other"); });
  for (int x = 0; x < grid.x; x += size.x) for (int y = 0; y < grid.y; y += size.y) {
    cluster.clear();
    everyone = std::make_unique<Meeting>(threads * size.x * size.y);
    std::vector<std::thread> all;
    for (int r = 0; r < size.x * size.y; r++) {
      auto& block = cluster.emplace_back(std::make_unique<Block>());
      memset(block->shared, 0xff, MOST);
      block->warps = std::deque<Warp>(threads / 32);
      block->groups = std::deque<Group>(multiply / 128);
      block->named = std::make_unique<Meeting>(multiply);
      block->alive = threads;
    }
    for (int r = 0; r < size.x * size.y; r++) for (int t = 0; t < threads; t++) all.emplace_back([=] {
      rank = r; threadIdx = {t, 0, 0}; blockIdx = {x + r % size.x, y + r / size.x, 0};
      kernel();
      here().alive--;
    });
    for (auto& thread : all) thread.join();
  }
  running.unlock();
  watch.join();
}
