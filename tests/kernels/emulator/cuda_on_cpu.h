// What CUDA C is to a C++ compiler: kernels run on one CPU thread, each of their threads a fiber.
//
// A fiber runs until it waits for others. The fibers of a cluster run together, clusters one after the
// other, all in an order that a seed decides. Shared memory, stacks and whatever an earlier kernel may
// still be writing begin as bytes of 0xFF, NaN in every format. Asynchronous copies and products happen
// when they are asked for or as late as they may, and some block of a cluster may start late, which the
// seed decides too.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <map>
#include <numeric>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace on_cpu {

using Address = uint32_t;  // in shared memory; rank + 1 in the upper 8 bits where it is a cluster's

constexpr int STACK = 1 << 16, POISONED_STACK = 1 << 13;
constexpr Address BASE = 1024, GUARD = 1024, MOST_SHARED = 227 * 1024;  // BASE as on Hopper
constexpr int MOST_THREADS = 2048;
constexpr int MOST_TURNS = 30000000;  // of a cluster's threads: one that takes more does not end

struct Dimensions { unsigned x, y, z; };
struct Range { uint8_t *begin, *end; int hidden; };  // hidden: until griddepcontrol.wait

struct Barrier {  // mbarrier
  int count = 0, pending = 0;
  long long bytes = 0;
  unsigned phase = 0;
};

struct Block {
  Dimensions index;
  int rank, alive, waiting, unstarted;
  uint8_t* memory;
  std::map<Address, Barrier> barriers;
  std::map<Address, int> arrived;  // at numbered barriers (bar.sync)
};

struct Piece { uint8_t* to; const uint8_t* from; int bytes, zeros; };  // of cp.async
struct Product {  // of wgmma
  float* d[32];
  const uint32_t* a[4];
  uint64_t x;
  int width;
  bool adds;
};

struct Warp;
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  Dimensions thread;
  Block* block;
  Warp* warp;
  int lane;
  bool started, done;
  const char* waits;  // for what; null: it may run
  Address barrier;    // that it waits for, or the number of one
  int cluster_phase;  // that it arrived in, -1 for none
  std::vector<Piece> pieces;
  std::vector<size_t> groups;  // where those that were committed end
  std::vector<Product> products;
  std::vector<size_t> product_groups;  // where those that were committed end
  bool fenced;
};

struct Warp {
  Fiber* lanes[32];
  uint32_t ready, arrived;
  const char* collective;
  uint32_t in[32], out[32];
  uint32_t a[32][4], b[32][2];
  float *d[32][4], c[32][4];
  // of the warpgroup that begins here
  int group_arrived;
  const char* group_collective;
};

struct Matrix { const uint8_t* rows; long long count, bytes; };  // the emulator's TensorMap: bytes of a row
struct Copy {  // in bulk; of a matrix: a box of 64 rows by 128 bytes from (row, byte)
  uint8_t* to;
  const uint8_t* from;
  Address barrier;
  int bytes;
  Block* block;
  const Matrix* matrix;
  int row, byte;
};

inline Dimensions grid, block_size;
inline Fiber* now;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<Block> blocks;
inline std::vector<Copy> copies;
inline std::vector<Range> ranges;
inline std::vector<std::vector<uint8_t>> saved;
inline std::vector<int> priorities;
inline std::map<int, Address> statics;
inline Address dynamic_bytes, static_bytes, arena_bytes;
inline int cluster_alive, cluster_arrived, cluster_phase, warps_of_a_block;
inline bool revealed, late, by_priority;
inline Block* held;  // it starts when no other one can go on
inline uint64_t ready_warps, random_state;
inline jmp_buf scheduler;
inline char error[4096];
inline uint8_t* stacks;
inline void (*kernel)(void**);
inline void** kernel_arguments;

inline uint32_t draw(uint32_t below) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>((random_state >> 33) % below);
}

__attribute__((format(printf, 1, 2))) inline void note(const char* format, ...) {
  if (error[0]) return;
  int used = 0;
  if (now) {
    const Dimensions& at = now->block->index;
    used = snprintf(error, sizeof error, "thread %u of block (%u, %u, %u): ", now->thread.x, at.x, at.y, at.z);
  }
  va_list values;
  va_start(values, format);
  vsnprintf(error + used, sizeof error - used, format, values);
  va_end(values);
}
[[noreturn]] inline void stop() { _longjmp(scheduler, 1); }
#define ON_CPU_FAIL(...) (on_cpu::note(__VA_ARGS__), on_cpu::stop())

inline void wake(Fiber& fiber) {
  if (fiber.done) return;
  fiber.waits = nullptr;
  fiber.warp->ready |= 1u << fiber.lane;
  ready_warps |= 1ull << (fiber.warp - warps.data());
}

__attribute__((noinline)) inline void wait(const char* what) {
  now->waits = what;
  if (_setjmp(now->place) == 0) _longjmp(scheduler, 1);
}

inline void wake_all(Block* block, const char* what) {
  for (Fiber& fiber : fibers)
    if ((!block || fiber.block == block) && fiber.waits == what) wake(fiber);
}

// ---- memory

inline uint8_t* global(const void* at, size_t bytes, const char* what, size_t alignment = 0) {
  uint8_t* start = static_cast<uint8_t*>(const_cast<void*>(at));
  if (reinterpret_cast<uintptr_t>(at) % (alignment ? alignment : bytes))
    ON_CPU_FAIL("%s of %zu bytes is not aligned", what, bytes);
  for (const Range& range : ranges)
    if (start >= range.begin && start + bytes <= range.end) return start;
  for (size_t i = 0; i < ranges.size(); i++)
    if (start >= ranges[i].begin - 512 && start < ranges[i].end + 512)
      ON_CPU_FAIL("%s of %zu bytes at byte %td of argument %zu, which has %td", what, bytes,
                  start - ranges[i].begin, i, ranges[i].end - ranges[i].begin);
  ON_CPU_FAIL("%s of %zu bytes outside every argument", what, bytes);
}

inline uint8_t* dynamic_shared() { return now->block->memory + BASE; }

template <class T, int ID> T& static_shared() {
  if (!statics.count(ID)) {
    static_bytes = (static_bytes + 15) / 16 * 16;
    statics[ID] = BASE + dynamic_bytes + GUARD + static_bytes;
    static_bytes += sizeof(T);
    if (dynamic_bytes + static_bytes > MOST_SHARED)
      ON_CPU_FAIL("%u + %u bytes of shared memory", dynamic_bytes, static_bytes);
  }
  return *reinterpret_cast<T*>(now->block->memory + statics[ID]);
}

inline uint8_t* shared_memory(Address at, Address bytes, const char* what, Block* block = nullptr) {
  if (at % (bytes < 16 ? bytes : 16)) ON_CPU_FAIL("%s at %u in shared memory is not aligned", what, at);
  const Address first = BASE + dynamic_bytes + GUARD;
  if (!(at >= BASE && at + bytes <= BASE + dynamic_bytes) && !(at >= first && at + bytes <= first + static_bytes))
    ON_CPU_FAIL("%s of %u bytes at %u, outside shared memory", what, bytes, at);
  return (block ? block : now->block)->memory + at;
}

inline float half_value(uint16_t bits) {
  const uint32_t whole = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &whole, 4);
  return value;
}
inline uint16_t round_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, digits = bits & 1023;
  float size = exponent ? ldexpf(static_cast<float>(1024 + digits), exponent - 25) : ldexpf(static_cast<float>(digits), -24);
  if (exponent == 31) size = digits ? NAN : INFINITY;
  return bits >> 15 ? -size : size;
}
inline uint16_t round_float16(float value) {
  const float size = fabsf(value);
  const unsigned sign = signbit(value) ? 0x8000 : 0;
  if (value != value) return 0x7FFF;
  if (size >= 65520.f) return static_cast<uint16_t>(sign | 0x7C00);
  const int exponent = size < 6.103515625e-5f ? -14 : ilogbf(size);  // 2^-14
  const unsigned digits = static_cast<unsigned>(nearbyintf(ldexpf(size, 10 - exponent)));
  return static_cast<uint16_t>(sign | (digits < 1024 ? digits : (static_cast<unsigned>(exponent + 15) << 10) + digits - 1024));
}

// ---- warps and blocks

// All lanes of a warp; the last one that comes calls `finish`.
template <class Finish> void collect(const char* kind, Finish finish) {
  Warp& warp = *now->warp;
  if (!warp.arrived) warp.collective = kind;
  if (warp.collective != kind) ON_CPU_FAIL("%s, where other lanes of the warp are at %s", kind, warp.collective);
  warp.arrived |= 1u << now->lane;
  if (warp.arrived != ~0u) return wait(kind);
  warp.arrived = 0;
  finish(warp);
  for (Fiber* lane : warp.lanes)
    if (lane != now) wake(*lane);
}

// All 128 lanes of a warpgroup.
template <class Finish> void collect_group(const char* kind, Finish finish) {
  const int own = static_cast<int>(now->warp - warps.data()), inner = own % warps_of_a_block, first = own - inner % 4;
  Warp& warp = warps[first];
  if (inner - inner % 4 + 4 > warps_of_a_block) ON_CPU_FAIL("%s by no whole warpgroup", kind);
  if (!warp.group_arrived) warp.group_collective = kind;
  if (warp.group_collective != kind) ON_CPU_FAIL("%s, where others of the warpgroup are at %s", kind, warp.group_collective);
  if (++warp.group_arrived != 128) return wait(kind);
  warp.group_arrived = 0;
  finish(&warp);
  for (int w = 0; w < 4; w++)
    for (Fiber* lane : warps[first + w].lanes)
      if (lane != now) wake(*lane);
}

inline const char SYNCTHREADS[] = "__syncthreads", CLUSTER[] = "barrier.cluster.wait", PREVIOUS[] = "griddepcontrol.wait",
                  BARRIER[] = "mbarrier.try_wait", SHUFFLE[] = "__shfl_sync", SHUFFLE_XOR[] = "__shfl_xor_sync",
                  BALLOT[] = "__ballot_sync", SYNCWARP[] = "__syncwarp", NUMBERED[] = "bar.sync", MATRICES[] = "ldmatrix", MMA[] = "mma.sync", WGMMA[] = "wgmma.mma_async",
                  WGMMA_WAIT[] = "wgmma.wait_group";

inline void release_block(Block& block) {
  if (block.waiting == 0 || block.waiting < block.alive) return;
  block.waiting = 0;
  wake_all(&block, SYNCTHREADS);
}
inline void release_cluster() {
  if (cluster_arrived == 0 || cluster_arrived < cluster_alive) return;
  cluster_arrived = 0;
  cluster_phase++;
  wake_all(nullptr, CLUSTER);
}
inline void sync_threads() {
  Block& block = *now->block;
  block.waiting++;
  if (block.waiting < block.alive) return wait(SYNCTHREADS);
  release_block(block);
}

inline void sync_some(Address number, int threads) {
  Block& block = *now->block;
  now->barrier = number;
  if (++block.arrived[number] < threads) return wait(NUMBERED);
  block.arrived[number] = 0;
  for (Fiber& fiber : fibers)
    if (fiber.block == &block && fiber.waits == NUMBERED && fiber.barrier == number) wake(fiber);
}

inline uint32_t check_mask(unsigned mask) {
  if (mask != ~0u) ON_CPU_FAIL("a mask of %x", mask);
  return mask;
}
inline uint32_t shuffle(const char* kind, uint32_t value, int operand) {
  Warp& warp = *now->warp;
  const int lane = now->lane;
  warp.in[lane] = value;
  warp.a[lane][0] = static_cast<uint32_t>(operand);
  collect(kind, [kind](Warp& own) {
    for (int i = 0; i < 32; i++) {
      const uint32_t from = kind == SHUFFLE_XOR ? i ^ own.a[i][0] : own.a[i][0];
      if (from > 31) ON_CPU_FAIL("%s from lane %u", kind, from);
      own.out[i] = own.in[from];
    }
  });
  return warp.out[lane];
}
inline uint32_t ballot(bool value) {
  Warp& warp = *now->warp;
  const int lane = now->lane;
  warp.in[lane] = value;
  collect(BALLOT, [](Warp& own) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= own.in[i] << i;
    for (uint32_t& each : own.out) each = bits;
  });
  return warp.out[lane];
}

// Four matrices of 8 rows by 16 bytes; lane 8 i + r has the address of row r of matrix i.
template <bool TRANSPOSED> void load_matrices(const std::array<uint32_t*, 4>& to, Address at) {
  Warp& warp = *now->warp;
  const int lane = now->lane;
  warp.in[lane] = at;
  collect(MATRICES, [](Warp& own) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int e = 0; e < 2; e++) {
          const int group = l / 4, pair = l % 4 * 2 + e;  // of a lane, and of its two numbers
          const uint8_t* row = shared_memory(own.in[8 * i + (TRANSPOSED ? pair : group)], 16, MATRICES);
          memcpy(reinterpret_cast<uint8_t*>(&own.a[l][i]) + 2 * e, row + 2 * (TRANSPOSED ? group : pair), 2);
        }
  });
  for (int i = 0; i < 4; i++) *to[i] = warp.a[lane][i];
}

// A of 16 rows: registers of 32 lanes, as mma and wgmma have them.
template <float (*VALUE)(uint16_t) = half_value> void unpack_a(float (&a)[16][16], int lane, const uint32_t (&words)[4]) {
  for (int i = 0; i < 4; i++)
    for (int e = 0; e < 2; e++)
      a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + e] = VALUE(static_cast<uint16_t>(words[i] >> (16 * e)));
}

template <float (*VALUE)(uint16_t)> void multiply(const std::array<float*, 4>& d, const std::array<uint32_t*, 4>& a,
                     const std::array<uint32_t*, 2>& b, const std::array<float*, 4>& c) {
  Warp& warp = *now->warp;
  const int lane = now->lane;
  for (int i = 0; i < 4; i++) { warp.d[lane][i] = d[i]; warp.c[lane][i] = *c[i]; warp.a[lane][i] = *a[i]; }
  for (int i = 0; i < 2; i++) warp.b[lane][i] = *b[i];
  collect(MMA, [](Warp& own) {
    float left[16][16], right[8][16];
    for (int l = 0; l < 32; l++) {
      unpack_a<VALUE>(left, l, own.a[l]);
      for (int i = 0; i < 4; i++)
        right[l / 4][l % 4 * 2 + i / 2 * 8 + i % 2] = VALUE(static_cast<uint16_t>(own.b[l][i / 2] >> (i % 2 * 16)));
    }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        double sum = own.c[l][i];
        for (int k = 0; k < 16; k++) sum += static_cast<double>(left[l / 4 + i / 2 * 8][k]) * right[l % 4 * 2 + i % 2][k];
        *own.d[l][i] = static_cast<float>(sum);
      }
  });
}

// Product `which` that is under way in a warpgroup. B: rows of 64 elements, 16-byte pieces at their
// place xor bits 7 to 9 of the address.
inline void multiply_group(Warp* group, size_t which) {
  const Product& any = group->lanes[0]->products[which];
  Block* block = group->lanes[0]->block;
  const Address start = static_cast<Address>(any.x & 0x3FFF) << 4, stride = static_cast<Address>(any.x >> 32 & 0x3FFF) << 4;
  if (any.x >> 62 != 1 || (any.x >> 49 & 7) != 0) ON_CPU_FAIL("a descriptor of another layout: %llx", static_cast<unsigned long long>(any.x));
  float right[64][16];
  for (int n = 0; n < any.width; n++)
    for (int k = 0; k < 16; k++) {
      const Address plain = start + n / 8 * stride + n % 8 * 128 + k * 2, at = plain ^ (plain >> 7 & 7) << 4;
      uint16_t bits;
      memcpy(&bits, shared_memory(at, 2, "wgmma", block), 2);
      right[n][k] = half_value(bits);
    }
  for (int w = 0; w < 4; w++) {
    float left[16][16];
    for (int l = 0; l < 32; l++) {
      const Product& own = group[w].lanes[l]->products[which];
      if (own.x != any.x || own.width != any.width || own.adds != any.adds) ON_CPU_FAIL("lanes of a warpgroup differ in a wgmma");
      unpack_a(left, l, {*own.a[0], *own.a[1], *own.a[2], *own.a[3]});
    }
    for (int l = 0; l < 32; l++) {
      const Product& own = group[w].lanes[l]->products[which];
      for (int i = 0; i < any.width / 2; i++) {
        const float *row = left[l / 4 + i / 2 % 2 * 8], *column = right[i / 4 * 8 + l % 4 * 2 + i % 2];
        double sum = own.adds ? *own.d[i] : 0.;
        for (int k = 0; k < 16; k++) sum += static_cast<double>(row[k]) * column[k];
        *own.d[i] = static_cast<float>(sum);
      }
    }
  }
}
inline void finish_products(Warp* group, size_t left) {
  const std::vector<size_t>& ends = group->lanes[0]->product_groups;
  const size_t done = ends.size() - left, count = ends[done - 1];
  for (int w = 0; w < 4; w++)
    for (Fiber* lane : group[w].lanes)
      if (lane->product_groups != ends) ON_CPU_FAIL("lanes of a warpgroup wait for different products");
  for (size_t i = 0; i < count; i++) multiply_group(group, i);
  for (int w = 0; w < 4; w++)
    for (Fiber* lane : group[w].lanes) {
      lane->products.erase(lane->products.begin(), lane->products.begin() + static_cast<ptrdiff_t>(count));
      lane->product_groups.erase(lane->product_groups.begin(), lane->product_groups.begin() + static_cast<ptrdiff_t>(done));
      for (size_t& end : lane->product_groups) end -= count;
    }
}

template <size_t N> void start_product(const std::array<float*, N>& d, const std::array<uint32_t*, 4>& a,
                                       uint64_t x, bool adds, int scale_a, int scale_b, int transposed) {
  if (!now->fenced) ON_CPU_FAIL("wgmma without wgmma.fence");
  if (scale_a != 1 || scale_b != 1 || transposed) ON_CPU_FAIL("a wgmma of another kind");
  Product product = {{}, {a[0], a[1], a[2], a[3]}, x, static_cast<int>(2 * N), adds};
  for (size_t i = 0; i < N; i++) product.d[i] = d[i];
  if (late && !adds)
    for (float* each : d) *each = NAN;
  now->products.push_back(product);
  if (!late)
    collect_group(WGMMA, [](Warp* group) {
      multiply_group(group, 0);
      for (int w = 0; w < 4; w++)
        for (Fiber* lane : group[w].lanes) lane->products.clear();
    });
}

// ---- asynchronous copies

inline void settle(Block& block, Address at) {
  Barrier& barrier = block.barriers[at];
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.count;
  barrier.phase ^= 1;
  for (Fiber& fiber : fibers)
    if (fiber.block == &block && fiber.waits == BARRIER && fiber.barrier == at) wake(fiber);
}
inline Barrier& barrier_at(Address at) {
  shared_memory(at, 8, "an mbarrier");
  if (!now->block->barriers.count(at)) ON_CPU_FAIL("no mbarrier was made at %u", at);
  return now->block->barriers[at];
}
inline void arrive(Address at, int bytes) {
  Barrier& barrier = barrier_at(at);
  if (barrier.pending == 0) ON_CPU_FAIL("more arrive at the mbarrier at %u than its %d", at, barrier.count);
  barrier.pending--;
  barrier.bytes += bytes;
  settle(*now->block, at);
}
inline void finish(const Copy& copy) {
  if (!copy.matrix) memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  for (int i = 0; copy.matrix && i < copy.bytes; i++) {
    const long long row = copy.row + i / 128, byte = copy.byte + i % 128;
    const bool inside = row < copy.matrix->count && byte < copy.matrix->bytes;
    copy.to[i ^ (i >> 7 & 7) << 4] = inside ? copy.matrix->rows[row * copy.matrix->bytes + byte] : 0;
  }
  copy.block->barriers[copy.barrier].bytes -= copy.bytes;
  settle(*copy.block, copy.barrier);
}
inline void finish(const Piece& piece) {
  memcpy(piece.to, piece.from, static_cast<size_t>(piece.bytes));
  memset(piece.to + piece.bytes, 0, static_cast<size_t>(piece.zeros));
}

// ---- what runs

inline void begin_thread() {
  (*kernel)(kernel_arguments);
  if (!now->pieces.empty()) ON_CPU_FAIL("it ends with copies that it did not wait for");
  if (!now->products.empty()) ON_CPU_FAIL("it ends with products that it did not wait for");
  Block& block = *now->block;
  now->done = true;
  block.alive--;
  cluster_alive--;
  if (now->cluster_phase == cluster_phase) cluster_arrived--;
  release_block(block);
  release_cluster();
  stop();
}

__attribute__((noinline)) inline void resume(Fiber* fiber) {
  now = fiber;
  if (_setjmp(scheduler)) return;
  if (fiber->started) _longjmp(fiber->place, 1);
  fiber->started = true;
  fiber->block->unstarted--;
  setcontext(&fiber->context);
}

inline Fiber* choose() {
  int chosen = -1;
  if (by_priority) {
    if (draw(500) == 0) std::swap(priorities[draw(static_cast<uint32_t>(warps.size()))], priorities[0]);
    for (int w = 0; w < static_cast<int>(warps.size()); w++)
      if (ready_warps >> w & 1 && (chosen < 0 || priorities[w] < priorities[chosen])) chosen = w;
  } else {
    uint64_t left = ready_warps;
    for (uint32_t skipped = draw(static_cast<uint32_t>(__builtin_popcountll(left))); skipped; skipped--) left &= left - 1;
    chosen = __builtin_ctzll(left);
  }
  Warp& warp = warps[static_cast<size_t>(chosen)];
  uint32_t lanes = warp.ready;
  for (uint32_t skipped = draw(static_cast<uint32_t>(__builtin_popcount(lanes))); skipped; skipped--) lanes &= lanes - 1;
  const int lane = __builtin_ctz(lanes);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) ready_warps &= ~(1ull << chosen);
  return warp.lanes[lane];
}

inline void hide() {
  revealed = by_priority;  // else all threads would meet at griddepcontrol.wait
  if (revealed) return;
  saved.clear();
  for (const Range& range : ranges) {
    saved.emplace_back();
    if (!range.hidden) continue;
    saved.back().assign(range.begin, range.end);
    memset(range.begin, 0xFF, static_cast<size_t>(range.end - range.begin));
  }
}
inline void reveal() {
  if (revealed) return;
  revealed = true;
  for (size_t i = 0; i < ranges.size(); i++) {
    for (const uint8_t* at = ranges[i].begin; ranges[i].hidden && at < ranges[i].end; at++)
      if (*at != 0xFF) { note("argument %zu is written before griddepcontrol.wait", i); break; }
    if (ranges[i].hidden) memcpy(ranges[i].begin, saved[i].data(), saved[i].size());
  }
  wake_all(nullptr, PREVIOUS);
}

inline void describe_deadlock() {
  std::map<std::string_view, int> counts;
  for (const Fiber& fiber : fibers)
    if (!fiber.done) counts[fiber.waits ? fiber.waits : "nothing"]++;
  char text[1024] = "";
  for (const auto& [what, count] : counts) {
    const size_t used = strlen(text);
    snprintf(text + used, sizeof text - used, "%s%d at %s", used ? ", " : "", count, what.data());
  }
  now = nullptr;
  const Dimensions& at = blocks[0].index;
  note("deadlock in the cluster of block (%u, %u, %u): %zu threads, of which %s", at.x, at.y, at.z, fibers.size(), text);
}

inline void start_cluster(Dimensions first, int size, int threads) {
  blocks.assign(static_cast<size_t>(size), Block());
  fibers.assign(static_cast<size_t>(size * threads), Fiber());
  warps.assign(static_cast<size_t>(size * threads / 32), Warp());
  priorities.resize(warps.size());
  std::iota(priorities.begin(), priorities.end(), 0);
  for (size_t i = priorities.size() - 1; i; i--) std::swap(priorities[i], priorities[draw(static_cast<uint32_t>(i + 1))]);
  copies.clear();
  cluster_alive = size * threads;
  cluster_arrived = cluster_phase = 0;
  warps_of_a_block = threads / 32;
  held = by_priority && size > 1 ? &blocks[draw(static_cast<uint32_t>(size))] : nullptr;
  for (int rank = 0; rank < size; rank++) {
    Block& block = blocks[static_cast<size_t>(rank)];
    block.index = {first.x + static_cast<unsigned>(rank), first.y, first.z};
    block.rank = rank;
    block.alive = block.unstarted = threads;
    block.memory = static_cast<uint8_t*>(aligned_alloc(1024, arena_bytes));
    memset(block.memory, 0xFF, arena_bytes);
    for (int i = 0; i < threads; i++) {
      const int index = rank * threads + i;
      Fiber& fiber = fibers[static_cast<size_t>(index)];
      fiber.thread = {static_cast<unsigned>(i), 0, 0};
      fiber.block = &block;
      fiber.warp = &warps[static_cast<size_t>(index / 32)];
      fiber.lane = index % 32;
      fiber.cluster_phase = -1;
      fiber.warp->lanes[fiber.lane] = &fiber;
      uint8_t* stack = stacks + static_cast<size_t>(index) * STACK;
      memset(stack + STACK - POISONED_STACK, 0xFF, POISONED_STACK);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stack;
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, begin_thread, 0);
      if (&block != held) wake(fiber);
    }
  }
}

inline void check_guards() {
  for (const Block& block : blocks)
    for (Address i = 0; i < GUARD; i++)
      if (block.memory[i] != 0xFF || block.memory[BASE + dynamic_bytes + i] != 0xFF) {
        now = nullptr;
        return note("block (%u, %u, %u) writes beyond its shared memory", block.index.x, block.index.y, block.index.z);
      }
}

inline void run_cluster(Dimensions first, int size, int threads) {
  ready_warps = 0;
  start_cluster(first, size, threads);
  hide();
  for (int turn = 0; !error[0]; turn++) {
    if (turn == MOST_TURNS) {
      note("it does not end");
    } else if (ready_warps) {
      resume(choose());
    } else if (cluster_alive == 0) {
      break;
    } else if (!revealed) {
      reveal();
    } else if (held) {
      wake_all(held, nullptr);
      held = nullptr;
    } else if (!copies.empty()) {
      const size_t which = draw(static_cast<uint32_t>(copies.size()));
      const Copy copy = copies[which];
      copies.erase(copies.begin() + static_cast<ptrdiff_t>(which));
      finish(copy);
    } else {
      describe_deadlock();
    }
  }
  now = nullptr;
  reveal();
  if (!error[0] && !copies.empty()) note("a block ends before its bulk copies");
  if (!error[0]) check_guards();
  for (Block& block : blocks) free(block.memory);
}

}  // namespace on_cpu

// Null, or what went wrong.
extern "C" const char* on_cpu_launch(void (*kernel)(void**), void** arguments, const unsigned* grid, int threads,
                                     int shared_bytes, int cluster, const on_cpu::Range* ranges, int count,
                                     unsigned seed) {
  using namespace on_cpu;
  error[0] = 0;
  now = nullptr;
  on_cpu::kernel = kernel;
  kernel_arguments = arguments;
  on_cpu::grid = {grid[0], grid[1], grid[2]};
  block_size = {static_cast<unsigned>(threads), 1, 1};
  on_cpu::ranges.assign(ranges, ranges + count);
  statics.clear();
  dynamic_bytes = static_cast<Address>(shared_bytes);
  static_bytes = 0;
  arena_bytes = (BASE + dynamic_bytes + GUARD + MOST_SHARED + 1023) / 1024 * 1024;
  random_state = seed * 2654435761ull + 1;
  late = seed & 1;
  by_priority = seed & 2;
  if (threads % 32 || threads > 1024 || threads * cluster > MOST_THREADS || grid[0] % static_cast<unsigned>(cluster) ||
      dynamic_bytes > MOST_SHARED) {
    note("no launch of %d threads, clusters of %d and %d bytes", threads, cluster, shared_bytes);
    return error;
  }
  if (!stacks)
    stacks = static_cast<uint8_t*>(mmap(nullptr, static_cast<size_t>(MOST_THREADS) * STACK, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::vector<Dimensions> order;
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x += static_cast<unsigned>(cluster)) order.push_back({x, y, z});
  for (size_t i = order.size() - 1; i; i--) std::swap(order[i], order[draw(static_cast<uint32_t>(i + 1))]);
  for (const Dimensions& first : order) {
    run_cluster(first, cluster, threads);
    if (error[0]) return error;
  }
  return nullptr;
}

// ---- instructions: a PTX name, with _ for dots and colons

namespace ptx {
using namespace on_cpu;

template <class First, class... Rest> auto registers(First&& first, Rest&&... rest) {
  using T = std::remove_cv_t<std::remove_reference_t<First>>;
  return std::array<T*, 1 + sizeof...(Rest)>{const_cast<T*>(&first), const_cast<T*>(&rest)...};
}

inline void griddepcontrol_launch_dependents() {}
inline void setmaxnreg_inc_sync_aligned_u32(int) {}
inline void setmaxnreg_dec_sync_aligned_u32(int) {}
inline void griddepcontrol_wait() {
  if (!revealed) wait(PREVIOUS);
}

inline void setp_ne_b32(bool& p, uint32_t a, uint32_t b) { p = a != b; }
inline void cvt_rn_bf16x2_f32(uint32_t& to, float high, float low) {
  to = static_cast<uint32_t>(round_bf16(high)) << 16 | round_bf16(low);
}

inline void cvt_rn_f16x2_f32(uint32_t& to, float high, float low) {
  to = static_cast<uint32_t>(round_float16(high)) << 16 | round_float16(low);
}
inline void sub_f16x2(uint32_t& to, uint32_t a, uint32_t b) {
  auto of_one = [&](int shift) {
    const float less = float16_value(static_cast<uint16_t>(b >> shift));
    return static_cast<uint32_t>(round_float16(float16_value(static_cast<uint16_t>(a >> shift)) - less)) << shift;
  };
  to = of_one(16) | of_one(0);
}

inline void prefetch_global_L2(const void* at) { global(at, 1, "a prefetch"); }
inline void red_global_add_v2_f32(const void* at, const std::array<float*, 2>& values) {
  float* sums = reinterpret_cast<float*>(global(at, 8, "a reduction"));
  sums[0] += *values[0];
  sums[1] += *values[1];
}
inline void red_global_add_v4_f32(const void* at, const std::array<float*, 4>& values) {
  float* sums = reinterpret_cast<float*>(global(at, 16, "a reduction"));
  for (size_t i = 0; i < 4; i++) sums[i] += *values[i];
}

inline void bar_sync(Address number, int threads) { sync_some(number, threads); }
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(const std::array<uint32_t*, 4>& to, Address at) { load_matrices<false>(to, at); }
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(const std::array<uint32_t*, 4>& to, Address at) { load_matrices<true>(to, at); }
inline void ld_shared_u32(uint32_t& to, Address at) { memcpy(&to, shared_memory(at, 4, "ld.shared"), 4); }
inline void ld_shared_v2_u32(const std::array<uint32_t*, 2>& to, Address at) {
  const uint8_t* from = shared_memory(at, 8, "ld.shared");
  memcpy(to[0], from, 4);
  memcpy(to[1], from + 4, 4);
}
inline void mapa_shared_cluster_u32(Address& theirs, Address own, int rank) {
  shared_memory(own, 1, "mapa");
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) ON_CPU_FAIL("block %d of a cluster of %zu", rank, blocks.size());
  theirs = static_cast<Address>(rank + 1) << 24 | own;
}
inline void barrier_cluster_arrive_relaxed_aligned() {
  if (now->cluster_phase == cluster_phase) ON_CPU_FAIL("it arrives at the cluster's barrier twice");
  now->cluster_phase = cluster_phase;
  cluster_arrived++;
  release_cluster();
}
inline void barrier_cluster_wait_aligned() {
  if (now->cluster_phase < 0) ON_CPU_FAIL("it waits at the cluster's barrier without having arrived");
  if (now->cluster_phase == cluster_phase) wait(CLUSTER);
  now->cluster_phase = -1;
}

inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    const std::array<float*, 4>& d, const std::array<uint32_t*, 4>& a, const std::array<uint32_t*, 2>& b, const std::array<float*, 4>& c) {
  on_cpu::multiply<on_cpu::half_value>(d, a, b, c);
}
inline void mma_sync_aligned_m16n8k8_row_col_f32_bf16_bf16_f32(
    const std::array<float*, 4>& d, const std::array<uint32_t*, 2>& a, const std::array<uint32_t*, 1>& b, const std::array<float*, 4>& c) {
  uint32_t none = 0;  // of the second eight of K
  on_cpu::multiply<on_cpu::half_value>(d, {a[0], a[1], &none, &none}, {b[0], &none}, c);
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    const std::array<float*, 4>& d, const std::array<uint32_t*, 4>& a, const std::array<uint32_t*, 2>& b, const std::array<float*, 4>& c) {
  on_cpu::multiply<on_cpu::float16_value>(d, a, b, c);
}
#define ON_CPU_WGMMA(N)                                                                                         \
  inline void wgmma_mma_async_sync_aligned_m64n##N##k16_f32_bf16_bf16(                                          \
      const std::array<float*, N / 2>& d, const std::array<uint32_t*, 4>& a, uint64_t x, bool adds, int scale_a, \
      int scale_b, int transposed) {                                                                            \
    start_product(d, a, x, adds, scale_a, scale_b, transposed);                                                 \
  }
ON_CPU_WGMMA(8)
ON_CPU_WGMMA(16)
ON_CPU_WGMMA(32)
ON_CPU_WGMMA(64)
inline void wgmma_fence_sync_aligned() { now->fenced = true; }
inline void wgmma_commit_group_sync_aligned() {
  now->fenced = false;
  now->product_groups.push_back(now->products.size());
}
inline void wgmma_wait_group_sync_aligned(size_t left) {
  if (now->product_groups.size() > left) collect_group(WGMMA_WAIT, [left](Warp* group) { finish_products(group, left); });
}

inline void copy_piece(Address to, const void* from, int bytes, int wanted) {
  uint8_t* at = shared_memory(to, static_cast<Address>(bytes), "cp.async");
  if (wanted) global(from, static_cast<size_t>(wanted), "cp.async", static_cast<size_t>(bytes));
  const Piece piece = {at, static_cast<const uint8_t*>(from), wanted, bytes - wanted};
  if (late) {
    memset(at, 0xFF, static_cast<size_t>(bytes));
    now->pieces.push_back(piece);
  } else {
    finish(piece);
  }
}
inline void cp_async_cg_shared_global_L2_128B(Address to, const void* from, int bytes, int wanted) {
  if (bytes != 16) ON_CPU_FAIL("cp.async.cg of %d bytes", bytes);
  copy_piece(to, from, bytes, wanted);
}
inline void cp_async_ca_shared_global_L2_128B(Address to, const void* from, int bytes, int wanted) {
  if (bytes != 4 && bytes != 8 && bytes != 16) ON_CPU_FAIL("cp.async.ca of %d bytes", bytes);
  copy_piece(to, from, bytes, wanted);
}
inline void cp_async_commit_group() { now->groups.push_back(now->pieces.size()); }
inline void cp_async_wait_group(size_t left) {
  if (now->groups.size() <= left) return;
  const size_t done = now->groups.size() - left, count = now->groups[done - 1];
  for (size_t i = 0; i < count; i++) finish(now->pieces[i]);
  now->pieces.erase(now->pieces.begin(), now->pieces.begin() + static_cast<ptrdiff_t>(count));
  now->groups.erase(now->groups.begin(), now->groups.begin() + static_cast<ptrdiff_t>(done));
  for (size_t& end : now->groups) end -= count;
}

inline void mbarrier_init_shared_cta_b64(Address at, int count) {
  shared_memory(at, 8, "an mbarrier");
  Barrier& barrier = now->block->barriers[at];
  barrier = Barrier();
  barrier.count = barrier.pending = count;
}
inline void fence_mbarrier_init_release_cluster() {}
inline void st_async_weak_shared_cluster_mbarrier_complete_tx_bytes_f32(Address at, float value, Address barrier) {
  Block& block = blocks[(at >> 24) - 1];
  if (at >> 24 != barrier >> 24) ON_CPU_FAIL("st.async to another block than its mbarrier's");
  if (block.unstarted) ON_CPU_FAIL("a store to a block that has not started");
  if (!block.alive) ON_CPU_FAIL("a store to a block that has ended");
  memcpy(shared_memory(at & 0xFFFFFF, 4, "st.async", &block), &value, 4);
  const Address own = barrier & 0xFFFFFF;
  if (!block.barriers.count(own)) ON_CPU_FAIL("no mbarrier was made at %u", own);
  block.barriers[own].bytes -= 4;
  settle(block, own);
}
inline void fence_proxy_async_shared_cta() {}
inline void mbarrier_arrive_expect_tx_shared_cta_b64(Address at, int bytes) { arrive(at, bytes); }
inline void mbarrier_arrive_shared_cta_b64(Address at) { arrive(at, 0); }
inline void mbarrier_try_wait_parity_shared_cta_b64(bool& done, Address at, unsigned parity) {
  done = barrier_at(at).phase != parity;
  if (done) return;
  now->barrier = at;
  wait(BARRIER);
}
inline void start(uint8_t* at, const Copy& copy) {
  barrier_at(copy.barrier);
  if (late) {
    memset(at, 0xFF, static_cast<size_t>(copy.bytes));
    copies.push_back(copy);
  } else {
    finish(copy);
  }
}
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(Address to, const void* from, int bytes, Address barrier) {
  uint8_t* at = shared_memory(to, static_cast<Address>(bytes), "a bulk copy");
  global(from, static_cast<size_t>(bytes), "a bulk copy", 16);
  if (bytes % 16) ON_CPU_FAIL("a bulk copy of %d bytes", bytes);
  start(at, {at, static_cast<const uint8_t*>(from), barrier, bytes, now->block});
}
inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes(
    Address to, const void* map, const std::array<int, 2>& from, Address barrier) {
  uint8_t* at = shared_memory(to, 8192, "a tensor copy");
  if (to % 1024) ON_CPU_FAIL("a tensor copy to %u", to);
  const Matrix* matrix = *static_cast<const Matrix* const*>(map);
  if (from[0] < 0 || from[1] < 0) ON_CPU_FAIL("a tensor copy from %d, %d", from[0], from[1]);
  start(at, {at, nullptr, barrier, 8192, now->block, matrix, from[1], from[0]});
}
inline void cp_async_bulk_prefetch_L2_global(const void* from, int bytes) {
  global(from, static_cast<size_t>(bytes), "a bulk prefetch", 16);
  if (bytes % 16) ON_CPU_FAIL("a bulk prefetch of %d bytes", bytes);
}
inline void cp_async_bulk_prefetch_tensor_2d_L2_global(const void* map, const std::array<int, 2>& from) {
  const Matrix* matrix = *static_cast<const Matrix* const*>(map);
  if (from[0] < 0 || from[1] < 0 || from[0] >= matrix->bytes)  // rows past the last are left out
    ON_CPU_FAIL("a tensor prefetch from %d, %d", from[0], from[1]);
}

}  // namespace ptx

// ---- what CUDA C has without a header

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define threadIdx (on_cpu::now->thread)
#define blockIdx (on_cpu::now->block->index)
#define gridDim (on_cpu::grid)
#define blockDim (on_cpu::block_size)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T> T __ldg(const T* at) { return *reinterpret_cast<const T*>(on_cpu::global(at, sizeof(T), "__ldg")); }
template <class T> T __ldcg(const T* at) { return *reinterpret_cast<const T*>(on_cpu::global(at, sizeof(T), "__ldcg")); }
template <class T> T __ldca(const T* at) { return *reinterpret_cast<const T*>(on_cpu::global(at, sizeof(T), "__ldca")); }
template <class T> T atomicAdd(T* at, T value) {
  on_cpu::global(at, sizeof(T), "atomicAdd");
  const T before = *at;
  *at = before + value;
  return before;
}
inline void __threadfence() {}

inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned value = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned chosen = selector >> (4 * i) & 15;
    if (chosen > 7) ON_CPU_FAIL("__byte_perm of a sign");
    value |= static_cast<unsigned>(both >> (8 * chosen) & 255) << (8 * i);
  }
  return value;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline size_t __cvta_generic_to_shared(const void* at) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(at) - on_cpu::now->block->memory;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(on_cpu::arena_bytes)) ON_CPU_FAIL("an address that is not in shared memory");
  return static_cast<size_t>(offset);
}
[[noreturn]] inline void __trap() { ON_CPU_FAIL("__trap"); }

inline void __syncthreads() { on_cpu::sync_threads(); }
inline void __syncwarp(unsigned mask = ~0u) {
  on_cpu::check_mask(mask);
  on_cpu::collect(on_cpu::SYNCWARP, [](on_cpu::Warp&) {});
}
template <class T> T on_cpu_shuffle(unsigned mask, const char* kind, T value, int operand) {
  static_assert(sizeof(T) == 4);
  on_cpu::check_mask(mask);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = on_cpu::shuffle(kind, bits, operand);
  memcpy(&value, &bits, 4);
  return value;
}
template <class T> T __shfl_sync(unsigned mask, T value, int lane) { return on_cpu_shuffle(mask, on_cpu::SHUFFLE, value, lane); }
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) { return on_cpu_shuffle(mask, on_cpu::SHUFFLE_XOR, value, bits); }
inline unsigned __ballot_sync(unsigned mask, bool value) {
  on_cpu::check_mask(mask);
  return on_cpu::ballot(value);
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return fabsf(b) > 8.5070591730234616e37f && fabsf(b) < INFINITY ? 0.f * a : a / b; }  // 2^126
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
