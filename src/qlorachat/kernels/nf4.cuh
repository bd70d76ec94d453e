// What NF4 kernels share: bitsandbytes' bytes on their way into the operand registers of tensor cores.
//
// K may be permuted inside a block of 64 weights as long as x follows, so a byte (two neighbours) is
// one operand register without a shuffle of nibbles.
#pragma once

#include "common.cuh"

constexpr int TABLE = 65536;  // bytes

// Entry b of the table, at b * 256: 32 copies, one a lane, of the weights of the nibbles of b (high
// nibble first, as bitsandbytes stores them), then 32 of the float32 that absmax byte b stands for.

// Where `shared` begins in shared memory: known to the compiler, it costs no instruction.
#ifndef SHARED_BASE
#define SHARED_BASE 0  // for the kernel that finds it out
#endif
extern "C" __global__ void find_shared_base(u32* base) {
  *base = static_cast<u32>(__cvta_generic_to_shared(shared));
}

// byte `i` of `word` becomes bits 8 to 15 of an address whose bits 0 to 7 are the lane's
__device__ __forceinline__ u32 look_up(u32 word, u32 lane_offset, u32 i) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1 + %2];"
               : "=r"(value) : "r"(__byte_perm(word, lane_offset, 0x7504u | i << 4)), "n"(SHARED_BASE));
  return value;
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
  __device__ __forceinline__ void fill() const {
    if (__cvta_generic_to_shared(shared) != SHARED_BASE) __trap();
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int entry = threadIdx.x + i * THREADS;
      if (entry >= 256) break;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int at = (j + entry) & 7;  // spreads the stores over the banks
        reinterpret_cast<uint4*>(shared + entry * 256)[at] = make_uint4(pairs[i], pairs[i], pairs[i], pairs[i]);
        reinterpret_cast<uint4*>(shared + entry * 256 + 128)[at] = make_uint4(scales[i], scales[i], scales[i], scales[i]);
      }
    }
  }
};

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

// Where a lane finds the first of its two rows of a group of 16; the other one is 8 rows below.
struct Place {
  int packed, absmax;  // bytes from the start, at block 0
  int index, first;    // of its absmax in its part, and of the part's absmax2
  float offset;
};

__device__ __forceinline__ Place find(const Matrix& m, int group, int lane) {
  const int blocks = m.columns >> 6, row = group * 16 + (lane >> 2);
  const int part = (group * 16 >= m.start1) + (group * 16 >= m.start2);  // parts are whole groups
  const int start = part == 0 ? 0 : part == 1 ? m.start1 : m.start2;
  Place place;
  place.packed = row * (m.columns >> 1) + (lane & 3) * 16;
  place.absmax = row * blocks;
  place.index = (row - start) * blocks;
  place.first = part == 0 ? 0 : part == 1 ? m.group1 : m.group2;
  place.offset = part == 0 ? m.offset0 : part == 1 ? m.offset1 : m.offset2;
  return place;
}

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
__device__ __forceinline__ void load(Tile<CHUNK, ALIGNED>& tile, const Matrix& m, const Place& place,
                                     int block, int lane, bool wanted) {
  const int blocks = m.columns >> 6;
  tile.offset = place.offset;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u8* at = m.packed + (place.packed + half * 4 * m.columns + block * 32);
#pragma unroll
    for (int pair = 0; pair < CHUNK / 2; pair++) {
      const bool inside = ALIGNED || block + 2 * pair + ((lane & 3) >> 1) < blocks;
      if (!ALIGNED && wanted && !inside) tile.words[2 * pair + half] = make_uint4(0, 0, 0, 0);
      load_if(wanted && inside, tile.words[2 * pair + half], at + 64 * pair);
    }
    const u8* scale = m.absmax + (place.absmax + half * 8 * blocks + block);
    const int index = place.index + half * 8 * blocks + block;
    if (ALIGNED) {
      if (CHUNK == 4) load_if(wanted, tile.scales[half], reinterpret_cast<const u32*>(scale));
      else load_if(wanted, tile.scales[half], reinterpret_cast<const u16*>(scale));
      load_if(wanted, tile.groups[half][0], m.absmax2 + (place.first + (index >> 8)));
    } else if (wanted) {
      tile.scales[half] = 0;
#pragma unroll
      for (int j = 0; j < CHUNK; j++) {
        const bool inside = block + j < blocks;  // beyond, the words and x are 0
        tile.scales[half] |= inside ? static_cast<u32>(__ldg(scale + j)) << (8 * j) : 0;
        tile.groups[half][ALIGNED ? 0 : j] =
            inside ? __ldg(m.absmax2 + (place.first + ((index + j) >> 8))) : 0.f;
      }
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
