// NF4 weights written out in 16 bit, for products with many rows.

#include "nf4.cuh"

// [N, K]; a thread has 8 bytes, a quarter of a block. Rounds as bitsandbytes.
extern "C" __global__ void __launch_bounds__(256) nf4_write_out(
    const u8* packed, const u8* absmax, const float* absmax2, const float* code, const float* code2,
    uint4* out, int rows, int columns, int start1, int start2, int group1, int group2,
    float offset0, float offset1, float offset2) {
  float* values = reinterpret_cast<float*>(shared);  // 16
  if (threadIdx.x < 16) values[threadIdx.x] = code[threadIdx.x];
  __syncthreads();
  const int blocks = columns >> 6, index = blockIdx.x * 256 + threadIdx.x, block = index >> 2;
  if (block >= rows * blocks) return;
  const int row = block / blocks, column = block % blocks;  // column: of blocks
  const Matrix m = {packed, absmax, absmax2, rows, columns, start1, start2, group1, group2, offset0, offset1, offset2};
  const Part part = find_part(m, row);
  const float scale2 = __ldg(absmax2 + part.group + (((row - part.start) * blocks + column) >> 8));
  const u8 own = __ldg(find_absmax(m, row, column >> 2) + (column & 3));
  const float scale = __fadd_rn(__fmul_rn(__ldg(code2 + own), scale2), part.offset);
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
