// sums += W x for few rows of x, and the adapters' B (A x) in the same launch, on any card from Ampere
// on (mma.sync).
//
// Weights are the wide operand (A) of mma.m16n8k16, rows of x the narrow one (B): 1 to 8 rows cost the
// same. A warp has 16 rows of the weight and loads their bytes to its registers, one or two units ahead; x,
// tiled, comes to shared memory for all of a block. Further warps add the adapters' share. Blocks share
// the work as one long list of units, HEIGHT rows by 256 k each, in equal runs (stream-K); where a run
// leaves a row block, its float32 sums are added in global memory.

#include "nf4_matmul.cuh"

constexpr int WARPS = 8, HEIGHT = WARPS * 16;  // of the product
constexpr int HELPERS = 4;                     // warps for the adapters
constexpr int THREADS = (WARPS + HELPERS) * 32;

// A unit's x comes in PARTS, each a stage of a ring.
template <int P> struct Layout {
  static constexpr int PARTS = P == 64 ? 2 : 1, STAGES = P > 16 ? 2 : 3;
  static constexpr int BLOCKS = CHUNK / PARTS, BYTES = BLOCKS * P * 128, PIECES = (BYTES - 1) / (WARPS * 512) + 1;
  static constexpr int TOGETHER = P > 16 ? 1 : 2;  // units that a warp asks for at once
};

// Leaves what is there unless `wanted`, without a branch: after one, the compiler would move what was
// loaded to other registers, and wait for it there. Not .nc: such a load is moved behind a barrier.
__device__ __forceinline__ void load_if(bool wanted, uint2& into, const u8* at) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2]; }"
               : "+r"(into.x), "+r"(into.y) : "l"(at), "r"(static_cast<u32>(wanted)));
}

// What a lane has of a unit: weights 16 t to 16 t + 15 of each block, t = lane % 4, in rows lane / 4 and
// 8 further.
template <bool ALIGNED> struct Unit {
  uint2 words[CHUNK][2];
  u32 absmax[2];
  Scales<ALIGNED> scales;

  // zero: none of this is asked for before it is known.
  __device__ __forceinline__ void load(const Matrix& m, int group, int item, bool wanted, u32 zero) {
    const int lane = threadIdx.x & 31, row = group * 16 + (lane >> 2);
    const u8* at = m.packed + static_cast<u64>(row) * (m.columns >> 1) + item * CHUNK * 32 + (lane & 3) * 8 + zero;
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      const bool inside = ALIGNED || item * CHUNK + j < m.columns >> 6;
#pragma unroll
      for (int half = 0; half < 2; half++)
        load_if(wanted && inside, words[j][half], at + j * 32 + static_cast<u64>(half * 8) * (m.columns >> 1));
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
      absmax[half] = __ldg(reinterpret_cast<const u32*>(find_absmax(m, row + half * 8, item) + zero));
    scales.load(m, find_part(m, group * 16), row + zero, item);  // parts are whole groups
  }
  // Known when all of it is there; `zero` is one that the compiler does not know.
  __device__ __forceinline__ u32 arrive(u32 zero) const {
    u32 all = __float_as_uint(scales.groups[0][0]) ^ __float_as_uint(scales.groups[1][0]) ^ absmax[0] ^ absmax[1];
#pragma unroll
    for (int j = 0; j < CHUNK; j++) all ^= words[j][0].y ^ words[j][1].y;
    return all & zero;
  }
};

// The warps of the product, not the others.
__device__ __forceinline__ void wait_for_warps() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }

// Four matrices of 8 rows by 16 bytes, a row's address a lane: a word of each row lane / 4.
__device__ __forceinline__ void load_matrices(u32 (&into)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(into[0]), "=r"(into[1]), "=r"(into[2]), "=r"(into[3]) : "r"(at) : "memory");
}

template <int P, bool ALIGNED>
__device__ __forceinline__ void nf4_matmul(const Matrix& m, const RowAdapters& adapters, const u32* pairs,
                                           const float* code2, const u8* x, float* sums, int x_rows) {
  using L = Layout<P>;
  // A product waits for the one before it on the same sums: others come between.
  constexpr int TILES = P / 8, BESIDE = TILES < 4 ? TILES : 4, CHAINS = TILES == 1 ? 2 : 1;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  let_next_start();
  if (warp >= WARPS) {
    if (adapters.b) Expansion<P>(adapters, m)(sums, x_rows, blockIdx.x * HELPERS + warp - WARPS, gridDim.x * HELPERS);
    return;
  }
  const int items = ((m.columns >> 6) + CHUNK - 1) / CHUNK, last_group = m.rows / 16 - 1;
  const long long units = static_cast<long long>((m.rows + HEIGHT - 1) / HEIGHT) * items;
  const int begin = static_cast<int>(units * blockIdx.x / gridDim.x);
  const int steps = static_cast<int>(units * (blockIdx.x + 1) / gridDim.x) - begin;

  const TableEntries<WARPS * 32> entries(pairs, code2);
  Walk computing(items, begin), loading(items, begin);
  Unit<ALIGNED> held[2][L::TOGETHER];  // those that are computed, and the next
  int loaded = 0, computed = 0;
  auto load_next = [&](Unit<ALIGNED> (&units)[L::TOGETHER], u32 zero) {
#pragma unroll
    for (Unit<ALIGNED>& unit : units) {
      unit.load(m, min(loading.row_block * WARPS + warp, last_group), loading.item, loaded++ < steps, zero);
      loading.next(items);
    }
  };
  load_next(held[0], 0);
  entries.fill();
  wait_for_warps();  // for their entries
  wait_for_previous();

  int fetched = 0, x_part = begin % items * L::PARTS;
  auto stage_of = [](int part) { return SHARED_BASE + TABLE + part % L::STAGES * L::BYTES; };
  auto fetch_x = [&] {
    if (fetched < steps * L::PARTS) {
      const u8* from = x + static_cast<u64>(x_part) * L::BYTES + threadIdx.x * 16;
      const u32 to = stage_of(fetched) + threadIdx.x * 16;
#pragma unroll
      for (int i = 0; i < L::PIECES; i++)
        if (threadIdx.x * 16 + i * WARPS * 512 < L::BYTES) asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, 16;" ::"r"(to + i * WARPS * 32 * 16),
                     "l"(from + i * WARPS * 32 * 16) : "memory");
      if (++x_part == items * L::PARTS) x_part = 0;
    }
    fetched++;
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int stage = 0; stage < L::STAGES - 1; stage++) fetch_x();

  const u32 own_x = (lane & 7) * 128 + ((lane >> 3 ^ (lane & 7)) << 4);  // this lane's row of the first four matrices
  float total[TILES][4] = {};
  auto compute = [&](const Unit<ALIGNED>& unit) {
    u32 a[16];  // of a block: decoded beside the products of the one before it
    decode(unit.words[0], a);
#pragma unroll
    for (int part = 0; part < L::PARTS; part++) {
      asm volatile("cp.async.wait_group %0;" ::"n"(L::STAGES - 2) : "memory");
      wait_for_warps();  // for their x, and until none reads the stage that is filled next
      fetch_x();
      const u32 stage = stage_of(computed * L::PARTS + part);
      const u32 rows_at[2] = {stage + own_x, stage + (own_x ^ 64)};  // of the first and the second pair of products
#pragma unroll
      for (int i = 0; i < L::BLOCKS; i++) {
        const int j = part * L::BLOCKS + i;
        const float factors[2] = {unit.scales.factor(unit.absmax, 0, j), unit.scales.factor(unit.absmax, 1, j)};
        u32 next[16];
#pragma unroll
        for (int first = 0; first < TILES; first += BESIDE) {
          float sum[BESIDE][CHAINS][4] = {};
#pragma unroll
          for (int pair = 0; pair < 2; pair++) {
            u32 b[BESIDE][4];
#pragma unroll
            for (int c = 0; c < BESIDE; c++) load_matrices(b[c], rows_at[pair] + (i * P + 8 * (first + c)) * 128);
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int s = 2 * pair + half;
              const u32* own = a + 4 * s;
#pragma unroll
              for (int c = 0; c < BESIDE; c++)
                multiply(sum[c][s % CHAINS], own[0], own[1], own[2], own[3], b[c][2 * half], b[c][2 * half + 1]);
              if (first == 0 && j + 1 < CHUNK) decode_step(unit.words[j + 1], s, next + 4 * s);
            }
          }
#pragma unroll
          for (int c = 0; c < BESIDE; c++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              total[first + c][e] += factors[e >> 1] * (CHAINS == 2 ? sum[c][0][e] + sum[c][1][e] : sum[c][0][e]);
        }
        if (j + 1 < CHUNK) {
#pragma unroll
          for (int r = 0; r < 16; r++) a[r] = next[r];
        }
      }
    }
    computed++;
    const int group = computing.row_block * WARPS + warp;
    if (!computing.next(items) && computed < steps) return;
    if (group <= last_group) {
#pragma unroll
      for (int c = 0; c < TILES; c++)
        add_tile(sums + static_cast<u64>(8 * c) * m.rows + group * 16, total[c], m.rows, (1u << max(0, min(8, x_rows - 8 * c))) - 1);
    }
#pragma unroll
    for (int c = 0; c < TILES; c++)
#pragma unroll
      for (int e = 0; e < 4; e++) total[c][e] = 0.f;
  };
  // A warp can't wait for some of its loads, only for all. So some units are asked for when those before are
  // there, and come while these are computed.
  const u32 zero = static_cast<u32>(x_rows) >> 31;
  for (int step = 0; step < steps;) {
#pragma unroll
    for (int d = 0; d < 2; d++) {
      if (step >= steps) break;
      u32 none = zero;
#pragma unroll
      for (const Unit<ALIGNED>& unit : held[d]) none = unit.arrive(none);
      load_next(held[1 - d], none);
#pragma unroll
      for (const Unit<ALIGNED>& unit : held[d])
        if (step++ < steps) compute(unit);
    }
  }
}

#define INSTANCE(NAME, P, ALIGNED)                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                                 \
      const u8* packed, const u8* absmax, const float* absmax2, const u32* pairs, const float* code2,      \
      const u8* x, float* sums, const float* shrunk, const u16* lora_b, const int* lora_slots,             \
      const float* lora_scales, int count, int ranks, int x_rows, int rows, int columns, int start1,       \
      int start2, int group1, int group2, float offset0, float offset1, float offset2) {                   \
    const Matrix m = {packed, absmax, absmax2, rows, columns, start1, start2,                              \
                      group1, group2, offset0, offset1, offset2};                                          \
    const RowAdapters adapters = {shrunk, lora_b, lora_slots, lora_scales, count, ranks};                  \
    nf4_matmul<P, ALIGNED>(m, adapters, pairs, code2, x, sums, x_rows);                                    \
  }

INSTANCE(nf4_matmul_8, 8, true)
INSTANCE(nf4_matmul_16, 16, true)
INSTANCE(nf4_matmul_32, 32, true)
INSTANCE(nf4_matmul_64, 64, true)
INSTANCE(nf4_matmul_8_ragged, 8, false)
INSTANCE(nf4_matmul_16_ragged, 16, false)
INSTANCE(nf4_matmul_32_ragged, 32, false)
INSTANCE(nf4_matmul_64_ragged, 64, false)
