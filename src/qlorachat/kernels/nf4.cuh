// What NF4 kernels share: bitsandbytes' bytes on their way into the operand registers of tensor cores.
//
// K may be permuted inside a block of 64 weights as long as x follows, so a byte (two neighbours) is
// one operand register without a shuffle of nibbles.
#pragma once

#include "common.cuh"

constexpr int TABLE = 65536, SCALES = 1024;  // bytes

// Entry b of the table, at b * 256: 32 copies, one a lane, of the weights of the nibbles of b (high
// nibble first, as bitsandbytes stores them), then 32 of the float32 that absmax byte b stands for; or
// these one by one behind the table, where the second halves of entries are needed for other things.

// From shared memory, BEGIN + `at`. What is known to the compiler, as SHARED_BASE is, costs no instruction.
template <u32 BEGIN> __device__ __forceinline__ u32 load_word(u32 at) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(at), "n"(BEGIN));
  return word;
}
template <u32 BEGIN> __device__ __forceinline__ uint2 load_pair(u32 at) {
  uint2 pair;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(pair.x), "=r"(pair.y) : "r"(at), "n"(BEGIN));
  return pair;
}

// A lane as the compiler can't find it out again: short of registers it would, in the loop and slowly.
__device__ __forceinline__ int find_lane() { return __shfl_sync(~0u, threadIdx.x & 31, threadIdx.x & 31); }

// byte `i` of `word` becomes bits 8 to 15 of an address whose bits 0 to 7 are the lane's; HALF: of an entry
template <int HALF = 0> __device__ __forceinline__ u32 look_up(u32 word, int lane, u32 i) {
  return load_word<SHARED_BASE + HALF * 128>(__byte_perm(word, lane * 4, 0x7504u | i << 4));
}

// The table, filled by all threads of a block: what it is made of is loaded first, for the weights
// that are loaded meanwhile take longer. A barrier must follow `fill`.
template <int THREADS> struct TableEntries {
  static constexpr int OWN = (256 + THREADS - 1) / THREADS;
  u32 pairs[OWN], scales[OWN];

  __device__ __forceinline__ TableEntries(const u32* all_pairs, const float* code2) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int entry = threadIdx.x + i * THREADS;
      if (entry >= 256) break;
      pairs[i] = __ldg(all_pairs + entry);
      scales[i] = __ldg(reinterpret_cast<const u32*>(code2) + entry);
    }
  }
  template <bool SCALE_COPIES> __device__ __forceinline__ void fill() const {
    if (__cvta_generic_to_shared(shared) != SHARED_BASE) __trap();
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int entry = threadIdx.x + i * THREADS;
      if (entry >= 256) break;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int at = (j + entry) & 7;  // spreads the stores over the banks
        reinterpret_cast<uint4*>(shared + entry * 256)[at] = make_uint4(pairs[i], pairs[i], pairs[i], pairs[i]);
        if (SCALE_COPIES) reinterpret_cast<uint4*>(shared + entry * 256 + 128)[at] = make_uint4(scales[i], scales[i], scales[i], scales[i]);
      }
      if (!SCALE_COPIES) reinterpret_cast<u32*>(shared + TABLE)[entry] = scales[i];
    }
  }
};

struct Matrix {
  const u8* packed;       // [N, K / 2]
  const u8* absmax;       // [units of 4 blocks, N, 4], zeros past K
  const float* absmax2;   // of 256 absmax bytes each, counted along rows; each part begins a group of its own
  int rows, columns;      // N, K
  int start1, start2;     // first rows of the second and third part, N where there is none
  int group1, group2;     // their first group in absmax2
  float offset0, offset1, offset2;
};

// One of the weights that a matrix has stacked.
struct Part { int start, group; float offset; };  // its first row, its first absmax2

__device__ __forceinline__ Part find_part(const Matrix& m, int row) {
  if (row >= m.start2) return {m.start2, m.group2, m.offset2};
  if (row >= m.start1) return {m.start1, m.group1, m.offset1};
  return {0, 0, m.offset0};
}

__device__ __forceinline__ int count_parts(const Matrix& m) { return 1 + (m.start1 < m.rows) + (m.start2 < m.rows); }

// Where the absmax bytes of a row begin that belong to four blocks.
__device__ __forceinline__ const u8* find_absmax(const Matrix& m, int row, int unit) {
  return m.absmax + (static_cast<u64>(unit) * m.rows + row) * 4;
}
