// y = x W^T for few rows of x, on any card from Ampere on (mma.sync).
//
// Weights are the wide operand (A) of mma.m16n8k16, rows of x the narrow one (B): 1 to 8 rows cost
// the same. A block owns some groups of 16 weight rows, its warps share out K in chunks of CHUNK
// blocks of 64 weights, and partial sums meet in shared memory. absmax is applied to the float32 sums
// of a block of 64, where it is exact.

#include "nf4.cuh"

// What a lane loads of 16 rows and CHUNK blocks: rows g and g + 8.
// ALIGNED: K is a multiple of CHUNK blocks, so that a chunk lies in one group of 256 absmax bytes.
template <int CHUNK, bool ALIGNED> struct Tile {
  uint4 words[CHUNK];                         // by pairs of blocks: row g, row g + 8
  u32 scales[2];                              // absmax bytes, one a block
  float groups[2][ALIGNED ? 1 : CHUNK];       // and their absmax2
  float offset;
};

// Loads that leave what is there unless `wanted`, without a branch: after one, the compiler would move
// what was loaded to other registers, and wait for it there.
__device__ __forceinline__ void load_if(bool wanted, uint4& into, const u8* at) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4]; }"
               : "+r"(into.x), "+r"(into.y), "+r"(into.z), "+r"(into.w) : "l"(at), "r"(static_cast<u32>(wanted)));
}
__device__ __forceinline__ void load_if(bool wanted, u32& into, const u32* at) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u32 %0, [%1]; }"
               : "+r"(into) : "l"(at), "r"(static_cast<u32>(wanted)));
}
__device__ __forceinline__ void load_if(bool wanted, u32& into, const u16* at) {
  asm volatile("{ .reg .pred p; .reg .b16 h; setp.ne.u32 p, %2, 0; mov.b16 h, 0; @p ld.global.nc.u16 h, [%1]; @p cvt.u32.u16 %0, h; }"
               : "+r"(into) : "l"(at), "r"(static_cast<u32>(wanted)));
}
__device__ __forceinline__ void load_if(bool wanted, float& into, const float* at) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.f32 %0, [%1]; }"
               : "+f"(into) : "l"(at), "r"(static_cast<u32>(wanted)));
}

template <int CHUNK, bool ALIGNED>
__device__ __forceinline__ void load(Tile<CHUNK, ALIGNED>& tile, const Matrix& m, int group, int block, int lane,
                                     bool wanted) {
  const int blocks = m.columns >> 6;
  const Part part = find_part(m, group * 16);  // parts are whole groups
  tile.offset = part.offset;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = group * 16 + (lane >> 2) + half * 8;
    const u8* at = m.packed + static_cast<u64>(row) * (m.columns >> 1) + (lane & 3) * 16 + block * 32;
#pragma unroll
    for (int pair = 0; pair < CHUNK / 2; pair++) {
      const bool inside = ALIGNED || block + 2 * pair + ((lane & 3) >> 1) < blocks;
      if (!ALIGNED && wanted && !inside) tile.words[2 * pair + half] = make_uint4(0, 0, 0, 0);
      load_if(wanted && inside, tile.words[2 * pair + half], at + 64 * pair);
    }
    const u8* scale = find_absmax(m, row, block >> 2) + (block & 3);
    if (CHUNK == 4) load_if(wanted, tile.scales[half], reinterpret_cast<const u32*>(scale));
    else load_if(wanted, tile.scales[half], reinterpret_cast<const u16*>(scale));
    const int index = (row - part.start) * blocks + block;
#pragma unroll
    for (int j = 0; j < (ALIGNED ? 1 : CHUNK); j++) {
      const bool inside = ALIGNED || block + j < blocks;
      if (!ALIGNED && wanted && !inside) tile.groups[half][j] = 0.f;
      load_if(wanted && inside, tile.groups[half][j], m.absmax2 + (part.group + ((index + j) >> 8)));
    }
  }
}

// A 16-byte load gave lane t half of block t / 2 of a pair: two words go to lane t ^ 2, so that every
// lane has 8 bytes of each block. Lane t then has weights 16 t' to 16 t' + 15, t' = 0, 2, 1, 3.
// into: of blocks `first` and `first` + 1, two words of row g and two of row g + 8. The tile is not
// written to: what is loaded into it next then needs no other registers.
template <int CHUNK, bool ALIGNED>
__device__ __forceinline__ void exchange(const Tile<CHUNK, ALIGNED>& tile, uint4 (&into)[2], int first, int t) {
  const bool upper = t & 2;
  const uint4 low = tile.words[first], high = tile.words[first + 1];  // rows g and g + 8
  const u32 a = __shfl_xor_sync(~0u, upper ? low.x : low.z, 2), b = __shfl_xor_sync(~0u, upper ? low.y : low.w, 2);
  const u32 c = __shfl_xor_sync(~0u, upper ? high.x : high.z, 2), d = __shfl_xor_sync(~0u, upper ? high.y : high.w, 2);
  into[0] = upper ? make_uint4(a, b, c, d) : make_uint4(low.x, low.y, high.x, high.y);
  into[1] = upper ? make_uint4(low.z, low.w, high.z, high.w) : make_uint4(a, b, c, d);
}

// COLUMNS: rows of x in tiles of 8. CHUNK: blocks of 64 that a warp takes at a time. WARPS share K.
// DEPTH: tiles on their way to a warp.
template <int COLUMNS, int CHUNK, int WARPS, int DEPTH, bool ALIGNED>
__device__ __forceinline__ void nf4_matmul(const Matrix& m, const u32* table, const float* code2,
                                           const u16* x, u16* y, int x_rows, int groups_per_block) {
  let_next_start();
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, quad = lane >> 2, t = lane & 3;
  const int blocks = m.columns >> 6, chunks = (blocks + CHUNK - 1) / CHUNK;
  const int first_group = blockIdx.x * groups_per_block;
  const int groups = min(groups_per_block, m.rows / 16 - first_group);
  const int first_row = blockIdx.y * COLUMNS * 8;
  const int own = chunks > warp ? (chunks - warp + WARPS - 1) / WARPS : 0, steps = own * groups;
  float4* sums = reinterpret_cast<float4*>(shared + TABLE);  // [group][tile of x][warp][lane]

  const TableEntries<WARPS * 32> entries(table, code2);
  Tile<CHUNK, ALIGNED> tiles[DEPTH];
  int load_group = 0, load_chunk = warp, loaded = 0;
  auto load_next = [&](Tile<CHUNK, ALIGNED>& tile) {
    load(tile, m, first_group + load_group, load_chunk * CHUNK, lane, loaded < steps);
    loaded++;
    if (++load_group == groups) { load_group = 0; load_chunk += WARPS; }
  };
#pragma unroll
  for (int d = 0; d < DEPTH; d++) load_next(tiles[d]);
  entries.fill();
  wait_for_previous();
  __syncthreads();

  const int place = 16 * ((t & 1) * 2 + (t >> 1));
  uint4 b[CHUNK][COLUMNS][2];
  int group = 0, chunk = warp;
  auto compute = [&](Tile<CHUNK, ALIGNED>& tile) {
    uint4 words[2];
    if (group == 0) {
#pragma unroll
      for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
          const int row = first_row + c * 8 + quad, block = chunk * CHUNK + j;
          const uint4* at = reinterpret_cast<const uint4*>(x + static_cast<u64>(row) * m.columns + block * 64 + place);
          const bool inside = row < x_rows && block < blocks;
          b[j][c][0] = inside ? at[0] : make_uint4(0, 0, 0, 0);
          b[j][c][1] = inside ? at[1] : make_uint4(0, 0, 0, 0);
        }
    }
    float total[COLUMNS][4] = {};
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      float sum[COLUMNS][4] = {};
      if (j % 2 == 0) exchange(tile, words, j, t);
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const u32 low = s < 2 ? words[j & 1].x : words[j & 1].y, high = s < 2 ? words[j & 1].z : words[j & 1].w;
        const u32 i = (s & 1) * 2, offset = lane * 4;
        const u32 a0 = look_up(low, offset, i), a2 = look_up(low, offset, i + 1);
        const u32 a1 = look_up(high, offset, i), a3 = look_up(high, offset, i + 1);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const uint4 v = b[j][c][s >> 1];
          multiply(sum[c], a0, a1, a2, a3, s & 1 ? v.z : v.x, s & 1 ? v.w : v.y);
        }
      }
      const u32 offset = lane * 4 + 128;
      const float f0 = __uint_as_float(look_up(tile.scales[0], offset, j)) * tile.groups[0][ALIGNED ? 0 : j] + tile.offset;
      const float f1 = __uint_as_float(look_up(tile.scales[1], offset, j)) * tile.groups[1][ALIGNED ? 0 : j] + tile.offset;
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        total[c][0] += f0 * sum[c][0]; total[c][1] += f0 * sum[c][1];
        total[c][2] += f1 * sum[c][2]; total[c][3] += f1 * sum[c][3];
      }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      float4* at = sums + ((group * COLUMNS + c) * WARPS + warp) * 32 + lane;
      float4 value = make_float4(total[c][0], total[c][1], total[c][2], total[c][3]);
      if (chunk != warp) {
        const float4 before = *at;
        value.x += before.x; value.y += before.y; value.z += before.z; value.w += before.w;
      }
      *at = value;
    }
    if (++group == groups) { group = 0; chunk += WARPS; }
  };
  for (int step = 0; step < steps; step += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
      if (step + d < steps) { compute(tiles[d]); load_next(tiles[d]); }
  }
  __syncthreads();

  const int contributing = min(WARPS, chunks);
  for (int i = tid; i < groups * COLUMNS * 32; i += WARPS * 32) {
    const float4* at = sums + (i >> 5) * WARPS * 32 + (i & 31);
    float4 sum = at[0];
    for (int w = 1; w < contributing; w++) {
      const float4 value = at[w * 32];
      sum.x += value.x; sum.y += value.y; sum.z += value.z; sum.w += value.w;
    }
    const int l = i & 31, c = (i >> 5) % COLUMNS, g = (i >> 5) / COLUMNS;
    const int column = (first_group + g) * 16 + (l >> 2), row = first_row + c * 8 + 2 * (l & 3);
    u16* out = y + static_cast<u64>(row) * m.rows + column;
    if (row < x_rows) { out[0] = round_to_half(sum.x); out[8] = round_to_half(sum.z); }
    if (row + 1 < x_rows) { out[m.rows] = round_to_half(sum.y); out[m.rows + 8] = round_to_half(sum.w); }
  }
}

#define INSTANCE(NAME, COLUMNS, CHUNK, WARPS, DEPTH, ALIGNED)                                              \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) NAME(                               \
      const u8* packed, const u8* absmax, const float* absmax2, const u32* table,                 \
      const float* code2, const u16* x, u16* y, int x_rows, int rows, int columns, int start1,    \
      int start2, int group1, int group2, float offset0, float offset1, float offset2,            \
      int groups_per_block) {                                                                     \
    const Matrix m = {packed, absmax, absmax2, rows, columns, start1, start2,                     \
                      group1, group2, offset0, offset1, offset2};                                 \
    nf4_matmul<COLUMNS, CHUNK, WARPS, DEPTH, ALIGNED>(m, table, code2, x, y, x_rows, groups_per_block);    \
  }

INSTANCE(nf4_matmul_8, 1, 4, 16, 2, true)
INSTANCE(nf4_matmul_16, 2, 2, 16, 3, true)
INSTANCE(nf4_matmul_32, 4, 2, 8, 2, true)
INSTANCE(nf4_matmul_8_ragged, 1, 4, 16, 2, false)
INSTANCE(nf4_matmul_16_ragged, 2, 2, 16, 3, false)
INSTANCE(nf4_matmul_32_ragged, 4, 2, 8, 2, false)
