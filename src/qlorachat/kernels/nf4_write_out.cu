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
