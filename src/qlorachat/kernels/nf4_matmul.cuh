// What both NF4 products share: the list of units that their blocks work through, and decoding. All in
// bfloat16.
//
// Tiled x: [K / 64, P, 64] in units of 4 blocks, the last one padded with zeros. In a block, weight j
// is at 16 s + 8 h + 2 t + e, where lane t of a quad decodes it for step s, register half h; 16-byte
// pieces of a row are stored at their place xor the row's last three bits (128-byte swizzle).
#pragma once

#include "lora.cuh"
#include "nf4.cuh"

constexpr int CHUNK = 4;  // blocks of 64 k in a unit

// Units of 256 k of all row blocks, one after the other.
struct Walk {
  int item, row_block;
  __device__ Walk(int items, int unit) : item(unit % items), row_block(unit / items) {}
  __device__ bool next(int items) {  // whether the row block was left
    if (++item < items) return false;
    item = 0;
    row_block++;
    return true;
  }
};

// A block's run of the units, of `height` rows each; items: units of a row block.
struct Share {
  int items, begin, steps;
  __device__ __forceinline__ Share(int rows, int columns, int height) : items(((columns >> 6) + CHUNK - 1) / CHUNK) {
    const long long units = static_cast<long long>((rows + height - 1) / height) * items;
    begin = static_cast<int>(units * blockIdx.x / gridDim.x);
    steps = static_cast<int>(units * (blockIdx.x + 1) / gridDim.x) - begin;
  }
};

// What a warp knows of absmax2 for a unit: of a lane's rows, 8 apart.
// ALIGNED: K is a multiple of 256, so that a unit's row lies in one group of 256 absmax bytes.
template <bool ALIGNED> struct Scales {
  float groups[2][ALIGNED ? 1 : CHUNK], offset;
  __device__ __forceinline__ void load(const Matrix& m, const Part& part, int row, int item) {
    const int blocks = m.columns >> 6;
    offset = part.offset;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 index = (row + half * 8 - part.start) * blocks + item * CHUNK;
#pragma unroll
      for (int j = 0; j < (ALIGNED ? 1 : CHUNK); j++)
        groups[half][j] = ALIGNED || item * CHUNK + j < blocks ? __ldg(m.absmax2 + (part.group + ((index + j) >> 8))) : 0.f;
    }
  }
  // absmax of block `j` of a unit, whose absmax bytes are given. SCALE_COPIES: as the table was filled.
  template <bool SCALE_COPIES> __device__ __forceinline__ float factor(const u32 (&absmax)[2], int half, int j, int lane) const {
    const u32 code = SCALE_COPIES ? look_up<1>(absmax[half], lane, j)
                                  : reinterpret_cast<const u32*>(shared + TABLE)[absmax[half] >> 8 * j & 255];
    return __uint_as_float(code) * groups[half][ALIGNED ? 0 : j] + offset;
  }
};

// Operand A of product s of a block's four, of a lane's 16 weights in each of two rows.
__device__ __forceinline__ void decode_step(const uint2 (&words)[2], int s, int lane, u32* into) {
  const u32 low = s < 2 ? words[0].x : words[0].y, high = s < 2 ? words[1].x : words[1].y, i = (s & 1) * 2;
  into[0] = look_up(low, lane, i);
  into[1] = look_up(high, lane, i);
  into[2] = look_up(low, lane, i + 1);
  into[3] = look_up(high, lane, i + 1);
}
__device__ __forceinline__ void decode(const uint2 (&words)[2], int lane, u32 (&into)[16]) {
#pragma unroll
  for (int s = 0; s < 4; s++) decode_step(words, s, lane, into + 4 * s);
}
