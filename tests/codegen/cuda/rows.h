// What row kernels are written in, beside `blocks.h`: products and matrices of a warp, pairs of float16, reductions.
#include "blocks.h"
#include <cmath>

struct nv_bfloat16 { ushort bits; };
static float part(uint word, int i) {
  half value;
  ushort bits = word >> 16 * i;
  return memcpy(&value, &bits, 2), (float)value;
}
template <typename Operation>
static uint pairwise(Operation operation) { return pair(operation(1), operation(0)); }

static int lane() { return threadIdx.x % 32; }
template <typename T>
static T exchanged(T value, int other) {
  memcpy(&warp().words[lane()], &value, 4);
  warp_sync();
  memcpy(&value, &warp().words[other], 4);
  warp_sync();
  return value;
}
#define __shfl_sync(mask, value, other, width) exchanged(value, other)
#define __shfl_xor_sync(mask, value, other) exchanged(value, lane() ^ (other))
static uint __reduce_max_sync(uint, uint value) {
  for (int other = 16; other; other /= 2) value = max(value, __shfl_xor_sync(0, value, other));
  return value;
}

// cp.async: copies of a thread arrive when their group is waited for, not before.
struct Copy { uint to; const void* from; int size; };
thread_local std::vector<Copy> asked;
thread_local std::deque<std::vector<Copy>> groups;
static void copy_async(uint to, const void* from, int size) { asked.push_back({to, from, size}); }
static void close_group() { groups.push_back(std::move(asked)); asked.clear(); }
static void await_groups(size_t pending) {
  for (; groups.size() > pending; groups.pop_front())
    for (Copy& copy : groups.front()) memcpy(place(copy.to, copy.size), copy.from, copy.size);
}

// mma.m16n8k16 of float16, m16n8k32 of unsigned by signed bytes: sum c is that of row g + 8 (c / 2), column 2 t + c % 2.
static float of_words(float, uint x, uint y) { return part(x, 0) * part(y, 0) + part(x, 1) * part(y, 1); }
static uint of_words(uint, uint x, uint y) {
  int sum = 0;
  for (int k = 0; k < 32; k += 8) sum += (uchar)(x >> k) * (int8_t)(y >> k);
  return sum;
}
struct Operands { uint a[32][4], b[32][2]; };
static Operands operands[LIMIT][32];
template <typename Sum>
static void product(Sum (&sums)[4], const uint (&a)[4], const uint (&b)[2]) {
  Operands& all = operands[rank][threadIdx.x / 32];
  int g = lane() / 4, t = lane() % 4;
  memcpy(all.a[lane()], a, 16);
  memcpy(all.b[lane()], b, 8);
  warp_sync();
  for (int c = 0; c < 4; c++) for (int h = 0; h < 2; h++) for (int i = 0; i < 4; i++)
    sums[c] += of_words(Sum(), all.a[4 * g + i][2 * h + c / 2], all.b[4 * (2 * t + c % 2) + i][h]);
  warp_sync();
}

// ldmatrix and stmatrix of four matrices; lane l names row l % 8 of matrix l / 8.
static uchar* row_of(int matrix, int row) { return place(warp().words[8 * matrix + row], 16); }
static void load_matrices(uint (&words)[4], uint address, bool turned) {
  int g = lane() / 4, t = lane() % 4;
  warp().words[lane()] = address;
  warp_sync();
  for (int i = 0; i < 4; i++) {
    ushort both[2];
    for (int k = 0; k < 2; k++) memcpy(&both[k], row_of(i, turned ? 2 * t + k : g) + 2 * (turned ? g : 2 * t + k), 2);
    memcpy(&words[i], both, 4);
  }
  warp_sync();
}
static void store_matrices(uint address, const uint (&words)[4]) {
  warp().words[lane()] = address;
  warp_sync();
  for (int i = 0; i < 4; i++) memcpy(row_of(i, lane() / 4) + 4 * (lane() % 4), &words[i], 4);
  warp_sync();
}
static uint permuted(uint a, uint b, uint select) {
  uint64_t bytes = (uint64_t)b << 32 | a, out = 0;
  for (int i = 0; i < 4; i++) out |= (bytes >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
static float largest(float a, float b) { return a != a ? a : b != b ? b : fmaxf(a, b); }
