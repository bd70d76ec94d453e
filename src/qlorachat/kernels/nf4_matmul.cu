// y = x W^T for few rows of x, from bitsandbytes' own NF4 bytes, double quantization decoded here.
//
// Weights are the wide operand (A) of mma.m16n8k16, rows of x the narrow one (B): 1 to 8 rows cost
// the same. A block owns some groups of 16 weight rows, its warps share out K in chunks of CHUNK
// blocks of 64 weights, and partial sums meet in shared memory. K may be permuted inside a block of
// 64 as long as x follows, so a byte (two weights) is one operand register without a shuffle of
// nibbles. absmax is applied to the float32 sums of a block, where it is exact.
//
// Written without headers, for NVRTC. Compiled with BF16 as 1 or 0 (float16).

typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int TABLE = 65536;  // bytes

// Entry b of the table, at b * 256: 32 copies, one a lane, of the weights of the nibbles of b (high
// nibble first, as bitsandbytes stores them), then 32 of the float32 that absmax byte b stands for.
extern __shared__ __align__(1024) u8 shared[];

__device__ __forceinline__ uint4 load_once(const u8* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

// byte `i` of `word` becomes bits 8 to 15 of an address whose bits 0 to 7 are the lane's
__device__ __forceinline__ u32 look_up(u32 word, u32 lane_offset, u32 i) {
  return *reinterpret_cast<const u32*>(shared + __byte_perm(word, lane_offset, 0x7504u | i << 4));
}

__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u16 round_to_half(float value) {
  u16 half;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
#endif
  return half;
}

struct Matrix {
  const u8* packed;       // [N, K / 2]
  const u8* absmax;       // [N, K / 64]
  const float* absmax2;   // of 256 absmax bytes each; each part begins a group of its own
  int rows, columns;      // N, K
  int start1, start2;     // first rows of the second and third part, N where there is none
  int group1, group2;     // their first group in absmax2
  float offset0, offset1, offset2;
};

// What a lane loads of 16 rows and CHUNK blocks: rows g and g + 8.
// ALIGNED: K is a multiple of CHUNK blocks, so that a chunk lies in one group of 256 absmax bytes.
template <int CHUNK, bool ALIGNED> struct Tile {
  uint4 words[CHUNK];                         // by pairs of blocks: row g, row g + 8
  u32 scales[2];                              // absmax bytes, one a block
  float groups[2][ALIGNED ? 1 : CHUNK];       // and their absmax2
  float offset;
};

template <int CHUNK, bool ALIGNED>
__device__ __forceinline__ void load(Tile<CHUNK, ALIGNED>& tile, const Matrix& m, int group, int block, int lane) {
  const int blocks = m.columns >> 6, quad = lane >> 2, t = lane & 3;
  const int row = group * 16 + quad;
  const int part = (group * 16 >= m.start1) + (group * 16 >= m.start2);  // parts are whole groups of 16
  const int start = part == 0 ? 0 : part == 1 ? m.start1 : m.start2;
  const int first = part == 0 ? 0 : part == 1 ? m.group1 : m.group2;
  tile.offset = part == 0 ? m.offset0 : part == 1 ? m.offset1 : m.offset2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int mine = row + 8 * half;
    const u8* at = m.packed + static_cast<u64>(mine) * (m.columns >> 1) + block * 32 + t * 16;
#pragma unroll
    for (int pair = 0; pair < CHUNK / 2; pair++) {
      const bool inside = block + 2 * pair + (t >> 1) < blocks;
      tile.words[2 * pair + half] = inside ? load_once(at + 64 * pair) : make_uint4(0, 0, 0, 0);
    }
    const int index = (mine - start) * blocks + block;
    const u8* scale = m.absmax + static_cast<u64>(start) * blocks + index;
    if (ALIGNED) {
      tile.scales[half] = CHUNK == 4 ? __ldg(reinterpret_cast<const u32*>(scale))
                                     : __ldg(reinterpret_cast<const u16*>(scale));
      tile.groups[half][0] = __ldg(m.absmax2 + first + (index >> 8));
    } else {
      tile.scales[half] = 0;
#pragma unroll
      for (int j = 0; j < CHUNK; j++) {
        const bool inside = block + j < blocks;  // beyond, the words and x are 0
        tile.scales[half] |= inside ? static_cast<u32>(__ldg(scale + j)) << (8 * j) : 0;
        tile.groups[half][ALIGNED ? 0 : j] = inside ? __ldg(m.absmax2 + first + ((index + j) >> 8)) : 0.f;
      }
    }
  }
}

// A 16-byte load gave lane t half of block t / 2 of a pair: two words go to lane t ^ 2, so that every
// lane has 8 bytes of each block. Lane t then has weights 16 t' to 16 t' + 15, t' = 0, 2, 1, 3.
template <int CHUNK, bool ALIGNED>
__device__ __forceinline__ void exchange(Tile<CHUNK, ALIGNED>& tile, int t) {
  const bool upper = t & 2;
#pragma unroll
  for (int j = 0; j < CHUNK; j += 2) {
    const uint4 low = tile.words[j], high = tile.words[j + 1];  // rows g and g + 8
    const u32 a = __shfl_xor_sync(~0u, upper ? low.x : low.z, 2), b = __shfl_xor_sync(~0u, upper ? low.y : low.w, 2);
    const u32 c = __shfl_xor_sync(~0u, upper ? high.x : high.z, 2), d = __shfl_xor_sync(~0u, upper ? high.y : high.w, 2);
    tile.words[j] = upper ? make_uint4(a, b, c, d) : make_uint4(low.x, low.y, high.x, high.y);
    tile.words[j + 1] = upper ? make_uint4(low.z, low.w, high.z, high.w) : make_uint4(a, b, c, d);
  }
}

// COLUMNS: rows of x in tiles of 8. CHUNK: blocks of 64 that a warp takes at a time. WARPS share K.
// DEPTH: tiles on their way to a warp.
template <int COLUMNS, int CHUNK, int WARPS, int DEPTH, bool ALIGNED>
__device__ __forceinline__ void nf4_matmul(const Matrix& m, const u32* table, const float* code2,
                                           const u16* x, u16* y, int x_rows, int groups_per_block) {
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, quad = lane >> 2, t = lane & 3;
  const int blocks = m.columns >> 6, chunks = (blocks + CHUNK - 1) / CHUNK;
  const int first_group = blockIdx.x * groups_per_block;
  const int groups = min(groups_per_block, m.rows / 16 - first_group);
  const int first_row = blockIdx.y * COLUMNS * 8;
  const int own = chunks > warp ? (chunks - warp + WARPS - 1) / WARPS : 0, steps = own * groups;
  float4* sums = reinterpret_cast<float4*>(shared + TABLE);  // [group][tile of x][warp][lane]

  Tile<CHUNK, ALIGNED> tiles[DEPTH];
  int load_group = 0, load_chunk = warp, loaded = 0;
  auto load_next = [&](Tile<CHUNK, ALIGNED>& tile) {
    if (loaded < steps) load(tile, m, first_group + load_group, load_chunk * CHUNK, lane);
    loaded++;
    if (++load_group == groups) { load_group = 0; load_chunk += WARPS; }
  };
#pragma unroll
  for (int d = 0; d < DEPTH; d++) load_next(tiles[d]);
  for (int entry = tid; entry < 256; entry += WARPS * 32) {
    const u32 pair = __ldg(table + entry), scale = __ldg(reinterpret_cast<const u32*>(code2) + entry);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int at = (j + entry) & 7;  // spreads the stores over the banks
      reinterpret_cast<uint4*>(shared + entry * 256)[at] = make_uint4(pair, pair, pair, pair);
      reinterpret_cast<uint4*>(shared + entry * 256 + 128)[at] = make_uint4(scale, scale, scale, scale);
    }
  }
  __syncthreads();

  const int place = 16 * ((t & 1) * 2 + (t >> 1));
  uint4 b[CHUNK][COLUMNS][2];
  int group = 0, chunk = warp;
  auto compute = [&](Tile<CHUNK, ALIGNED>& tile) {
    exchange(tile, t);
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
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const u32 low = s < 2 ? tile.words[j].x : tile.words[j].y, high = s < 2 ? tile.words[j].z : tile.words[j].w;
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

// The weights written out, [N, K]: a thread has 8 bytes, a quarter of a block. Rounds as bitsandbytes.
extern "C" __global__ void __launch_bounds__(256) nf4_write_out(
    const u8* packed, const u8* absmax, const float* absmax2, const float* code, const float* code2,
    uint4* out, int rows, int columns, int start1, int start2, int group1, int group2,
    float offset0, float offset1, float offset2) {
  __shared__ float values[16];
  if (threadIdx.x < 16) values[threadIdx.x] = code[threadIdx.x];
  __syncthreads();
  const int blocks = columns >> 6, index = blockIdx.x * 256 + threadIdx.x, block = index >> 2;
  if (block >= rows * blocks) return;
  const int part = (block >= start1 * blocks) + (block >= start2 * blocks);
  const int start = part == 0 ? 0 : part == 1 ? start1 : start2;
  const int first = part == 0 ? 0 : part == 1 ? group1 : group2;
  const float offset = part == 0 ? offset0 : part == 1 ? offset1 : offset2;
  const float scale2 = __ldg(absmax2 + first + ((block - start * blocks) >> 8));
  const float scale = __fadd_rn(__fmul_rn(__ldg(code2 + __ldg(absmax + block)), scale2), offset);
  const uint2 words = __ldg(reinterpret_cast<const uint2*>(packed) + index);
  u32 pairs[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 byte = (i < 4 ? words.x : words.y) >> (8 * (i & 3)) & 255;
    const u32 low = round_to_half(values[byte >> 4] * scale);
    pairs[i] = low | static_cast<u32>(round_to_half(values[byte & 15] * scale)) << 16;
  }
  out[2 * index] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  out[2 * index + 1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}
