// sums += W x for few rows of x, and what its adapters ask for beside it, in one launch, on any card from
// Ampere on (mma.sync).
//
// Weights are the wide operand (A) of mma.m16n8k16, rows of x the narrow one (B): 1 to 8 rows cost the
// same. Both come to shared memory, a unit ahead: x for all of a block, and to each warp its own 16 rows of
// the weight. Further warps see to the adapters. Blocks share the work as one long list of units, HEIGHT rows
// by 256 k each, in equal runs (stream-K); where a run leaves a row block, its float32 sums are added in
// global memory.

#include "nf4_matmul.cuh"

constexpr int WARPS = 8, HEIGHT = WARPS * 16;  // of the product
constexpr int HELPERS = 4;                     // warps for the adapters
constexpr int THREADS = (WARPS + HELPERS) * 32;

// A block's dynamic shared memory: the table, of whose entries the second halves hold two units' weights, a
// row each; absmax bytes of two units; x. A unit's x comes in PARTS, of which there is room for two.
template <int P> struct Layout {
  static constexpr int PARTS = P == 64 ? 2 : 1, BLOCKS = CHUNK / PARTS, X_BYTES = BLOCKS * P * 128;
  static constexpr u32 W = SHARED_BASE + 128, ABSMAX = SHARED_BASE + TABLE + SCALES, X = ABSMAX + 2 * HEIGHT * CHUNK;
};

// Of two, where unit or part `number` is.
__device__ __forceinline__ u32 stage_of(u32 base, int number, int bytes) { return base + (number & 1) * bytes; }

// The warps of the product, not the others.
__device__ __forceinline__ void wait_for_warps() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }

template <int P, bool ALIGNED>
__device__ __forceinline__ void nf4_matmul(const Matrix& m, const Beside& beside, const u32* pairs, const float* code2,
                                           const u8* x, float* sums, int x_rows) {
  using L = Layout<P>;
  // A product waits for the one before it on the same sums: others come between.
  constexpr int TILES = P / 8, BESIDE = TILES < 4 ? TILES : 4, CHAINS = TILES == 1 ? 2 : 1;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3;
  let_next_start();
  if (warp >= WARPS) {
    beside.template add<P>(m, x, sums, x_rows, blockIdx.x * HELPERS + warp - WARPS, gridDim.x * HELPERS);
    return;
  }
  const Share share(m.rows, m.columns, HEIGHT);
  const int items = share.items, begin = share.begin, steps = share.steps, last_group = m.rows / 16 - 1;

  const TableEntries<WARPS * 32> entries(pairs, code2);
  // Lane 4 g + t has rows 2 (g % 4) + g / 4 and 8 further, as it reads them: no two of 16 lanes then share a
  // bank, for a row's 16-byte pieces are stored at their place xor its last three bits.
  const int own_row = (lane >> 2 & 3) * 2 + (lane >> 4);
  Walk computing(items, begin), loading(items, begin);
  Scales<ALIGNED> scales, next_scales;
  int asked = 0, fetched = 0, x_part = begin % items * L::PARTS;
  // A warp's rows of the next unit: eight lanes have one of 128 bytes. Those past the weight's last are as those
  // before.
  auto ask_for_weights = [&](Scales<ALIGNED>& scales) {
    const int number = asked++;
    if (number >= steps) return;
    const int group = min(loading.row_block * WARPS + warp, last_group), row_bytes = m.columns >> 1;
    const int byte = loading.item * CHUNK * 32 + (lane & 7) * 16;
    const u32 to = stage_of(L::W, number, HEIGHT * 256) + warp * 16 * 256;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = 4 * i + (lane >> 3);
      const u8* from = m.packed + static_cast<u64>(group * 16 + row) * row_bytes + byte;
      copy<16>(to + row * 256 + (((lane ^ row) & 7) << 4), from, ALIGNED || byte < row_bytes);
    }
    if (lane < 16) copy<4>(stage_of(L::ABSMAX, number, HEIGHT * CHUNK) + (warp * 16 + lane) * CHUNK, find_absmax(m, group * 16 + lane, loading.item), true);
    scales.load(m, find_part(m, group * 16), group * 16 + own_row, loading.item);  // parts are whole groups
    loading.next(items);
  };
  auto fetch_x = [&] {
    if (fetched == steps * L::PARTS) return;
    const u8* from = x + static_cast<u64>(x_part) * L::X_BYTES;
    const u32 to = stage_of(L::X, fetched++, L::X_BYTES);
#pragma unroll
    for (int at = 0; at < L::X_BYTES; at += WARPS * 512)
      copy<16>(to + at + threadIdx.x * 16, from + at + threadIdx.x * 16, true);
    if (++x_part == items * L::PARTS) x_part = 0;
  };
  ask_for_weights(scales);
  entries.fill<false>();
  wait_for_previous();
  fetch_x();
  commit_copies();

  const u32 own_x = (lane & 7) * 128 + ((lane >> 3 ^ (lane & 7)) << 4);  // this lane's row of the first four matrices
  const u32 own_w = (warp * 16 + own_row) * 256 + ((t >> 1 ^ own_row) << 4) + (t & 1) * 8;
  float total[TILES][4] = {};
  for (int step = 0; step < steps; step++) {
    u32 a[16], absmax[2];  // of a block: decoded beside the products of the one before it
    const u32 weights = stage_of(L::W, step, HEIGHT * 256) - SHARED_BASE + own_w;
    auto take = [&](int j, uint2 (&words)[2]) {
#pragma unroll
      for (int half = 0; half < 2; half++) words[half] = *reinterpret_cast<const uint2*>(shared + (weights ^ j << 5) + half * 8 * 256);
    };
#pragma unroll
    for (int part = 0; part < L::PARTS; part++) {
      if (part == 0) {
        wait_for_copies<0>();
      } else {  // the next unit's weights may yet come
        wait_for_copies<1>();
      }
      wait_for_warps();  // for what they have copied, and until none reads what is filled next
      fetch_x();
      commit_copies();
      if (part == 0) {
        ask_for_weights(next_scales);
        commit_copies();
        uint2 words[2];
        take(0, words);
        decode(words, lane, a);
        const u32 at = stage_of(L::ABSMAX, step, HEIGHT * CHUNK) - SHARED_BASE + (warp * 16 + own_row) * CHUNK;
#pragma unroll
        for (int half = 0; half < 2; half++) absmax[half] = *reinterpret_cast<const u32*>(shared + at + half * 8 * CHUNK);
      }
      const u32 stage = stage_of(L::X, step * L::PARTS + part, L::X_BYTES);
      const u32 rows_at[2] = {stage + own_x, stage + (own_x ^ 64)};  // of the first and the second pair of products
#pragma unroll
      for (int i = 0; i < L::BLOCKS; i++) {
        const int j = part * L::BLOCKS + i;
        const float factors[2] = {scales.template factor<false>(absmax, 0, j, lane), scales.template factor<false>(absmax, 1, j, lane)};
        uint2 words[2];
        u32 next[16];
        if (j + 1 < CHUNK) take(j + 1, words);
#pragma unroll
        for (int first = 0; first < TILES; first += BESIDE) {
          float sum[BESIDE][CHAINS][4] = {};
#pragma unroll
          for (int pair = 0; pair < 2; pair++) {
            u32 b[BESIDE][4];
#pragma unroll
            for (int c = 0; c < BESIDE; c++) load_matrices<false>(b[c], rows_at[pair] + (i * P + 8 * (first + c)) * 128);
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int s = 2 * pair + half;
              const u32* own = a + 4 * s;
#pragma unroll
              for (int c = 0; c < BESIDE; c++)
                multiply(sum[c][s % CHAINS], own[0], own[1], own[2], own[3], b[c][2 * half], b[c][2 * half + 1]);
              if (first == 0 && j + 1 < CHUNK) decode_step(words, s, lane, next + 4 * s);
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
    scales = next_scales;
    const int group = computing.row_block * WARPS + warp;
    if (!computing.next(items) && step + 1 < steps) continue;
    if (group <= last_group) {
#pragma unroll
      for (int c = 0; c < TILES; c++)
        add_tile<16>(sums + static_cast<u64>(8 * c) * m.rows + group * 16, total[c], m.rows, (1u << max(0, min(8, x_rows - 8 * c))) - 1);
    }
#pragma unroll
    for (int c = 0; c < TILES; c++)
#pragma unroll
      for (int e = 0; e < 4; e++) total[c][e] = 0.f;
  }
}

#define INSTANCE(NAME, P, ALIGNED)                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                            \
      const u8* packed, const u8* absmax, const float* absmax2, const u32* pairs, const float* code2,       \
      const u8* x, float* sums, const u16* lora_a, float* shrunk, const u16* lora_b, const int* lora_slots, \
      const float* lora_scales, int stride, int held, int ranks, int x_rows, int rows, int columns,         \
      int start1, int start2, int group1, int group2, float offset0, float offset1, float offset2) {        \
    const Matrix m = {packed, absmax, absmax2, rows, columns, start1, start2,                               \
                      group1, group2, offset0, offset1, offset2};                                           \
    const Beside beside = {lora_a, shrunk, lora_b, lora_slots, lora_scales, stride, held, ranks};           \
    nf4_matmul<P, ALIGNED>(m, beside, pairs, code2, x, sums, x_rows);                                       \
  }

INSTANCE(nf4_matmul_8, 8, true)
INSTANCE(nf4_matmul_16, 16, true)
INSTANCE(nf4_matmul_32, 32, true)
INSTANCE(nf4_matmul_64, 64, true)
INSTANCE(nf4_matmul_8_ragged, 8, false)
INSTANCE(nf4_matmul_16_ragged, 16, false)
INSTANCE(nf4_matmul_32_ragged, 32, false)
INSTANCE(nf4_matmul_64_ragged, 64, false)
