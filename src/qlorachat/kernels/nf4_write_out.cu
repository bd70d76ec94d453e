// NF4 weights written out in 16 bit, for products with many rows; an adapter's scale * B A in them, if there is one.

#include "nf4.cuh"
#include "sums.cuh"

// A block has 128 columns of a part's rows, a warp 16 or 32 of these. B is operand A of mma, A operand B, with columns
// so that a lane's sums are of eight neighbours, as are the weights of a word.
constexpr int WARPS = 8, THREADS = WARPS * 32, WIDTH = 128, GROUPS = WIDTH / 32;
// Of shared memory, in bytes; what a warp reads at once is in different banks.
constexpr int COPIES = 16 * 32 * 4;                     // each code value once a lane
constexpr int WORDS_STRIDE = WIDTH / 2 + 16;            // of a row of packed weights
constexpr int A_STRIDE = WIDTH * 2 + 16;                // of a rank

struct Adapter {
  const u16 *a, *b;  // [stride / 16, parts, 16, K], [N, stride], of which the first RANKS of `stride` are looked at
  int stride;
  float scale;
};

// What a block has of the weight: `height` rows of one part at most.
struct Tile {
  Part part;
  int number;     // of the part
  int row, stop;  // where the tile begins, where the part ends

  __device__ __forceinline__ Tile(const Matrix& m, int height) {
    const int starts[4] = {0, m.start1, m.start2, m.rows};
    int left = blockIdx.y;
#pragma unroll
    for (number = 0; number < 3; number++) {
      stop = starts[number + 1];
      const int tiles = (stop - starts[number] + height - 1) / height;
      if (left < tiles) break;
      left -= tiles;
    }
    row = starts[number] + left * height;
    part = find_part(m, row);
  }
};

// The absmax of a row's block, as bitsandbytes computes it; 0 past the matrix.
__device__ __forceinline__ float load_scale(const Matrix& m, const Tile& tile, const float* code2, int row, int block) {
  const int blocks = m.columns >> 6;
  if (row >= tile.stop || block >= blocks) return 0.f;
  const u8 byte = __ldg(find_absmax(m, row, block >> 2) + (block & 3));
  const float scale2 = __ldg(m.absmax2 + tile.part.group + ((row - tile.part.start) * blocks + block >> 8));
  return __fadd_rn(__fmul_rn(__ldg(code2 + byte), scale2), tile.part.offset);
}

template <int HEIGHT> __device__ __forceinline__ void copy_words(const Matrix& m, const Tile& tile, int column, u32 to) {
#pragma unroll
  for (int i = 0; i < HEIGHT * GROUPS / THREADS; i++) {
    const int piece = threadIdx.x + i * THREADS, row = piece / GROUPS, group = piece % GROUPS;
    if (tile.row + row >= tile.stop || column + 32 * group >= m.columns) continue;
    copy<16>(to + row * WORDS_STRIDE + group * 16, m.packed + (static_cast<u64>(tile.row + row) * m.columns + column) / 2 + group * 16);
  }
}
// Of each 32 columns, columns 8 t + 2 j and 8 t + 2 j + 1 lie where 8 j + 2 t would.
template <int RANKS> __device__ __forceinline__ void copy_a(const Adapter& adapter, const Matrix& m, const Tile& tile, int column, u32 to) {
  const int pair = threadIdx.x % (WIDTH / 2), position = pair & ~15 | (pair & 3) << 2 | (pair >> 2 & 3);
  if (column + 2 * pair >= m.columns) return;
  const int parts = count_parts(m);
  const u16* from = adapter.a + static_cast<u64>(tile.number) * 16 * m.columns + column + 2 * pair;
#pragma unroll
  for (int rank = threadIdx.x / (WIDTH / 2); rank < RANKS; rank += THREADS / (WIDTH / 2))
    copy<4>(to + rank * A_STRIDE + position * 4, from + static_cast<u64>((rank >> 4) * (parts * 16) + (rank & 15)) * m.columns);
}
// Of 16 rows and ranks: operand A. Parts are multiples of 16 rows.
__device__ __forceinline__ void load_b(u32 (&of)[4], const Adapter& adapter, int row, int stop, int rank) {
  const int lane = threadIdx.x & 31;
  const u16* from = adapter.b + static_cast<u64>(row + (lane >> 2)) * adapter.stride + rank + 2 * (lane & 3);
#pragma unroll
  for (int i = 0; i < 4; i++)
    of[i] = row < stop ? __ldg(reinterpret_cast<const u32*>(from + 8 * (i & 1) * adapter.stride + 8 * (i >> 1))) : 0;
}

// Rounds once: as bitsandbytes, if there is no adapter.
template <int RANKS>
__device__ __forceinline__ void write_out(const Matrix& m, const float* code, const float* code2, const Adapter& adapter,
                                          uint4* out) {
  constexpr int STEPS = RANKS / 16, HALVES = RANKS ? 2 : 1;  // of 16 rows: A is read once for both
  constexpr int ROWS = HALVES * 16, HEIGHT = WARPS * ROWS;
  float* values = reinterpret_cast<float*>(shared);
  const u32 begin = static_cast<u32>(__cvta_generic_to_shared(shared)) + COPIES;
  const int lane = threadIdx.x & 31, quad = lane >> 2, t = lane & 3, warp_row = static_cast<int>(threadIdx.x >> 5) * ROWS;
  const int column = blockIdx.x * WIDTH;
  const Tile tile(m, HEIGHT);
  const int row = tile.row + warp_row;
  copy_words<HEIGHT>(m, tile, column, begin);
  if constexpr (RANKS != 0) copy_a<RANKS>(adapter, m, tile, column, begin + HEIGHT * WORDS_STRIDE);
  commit_copies();
  u32 b[STEPS + 1][HALVES][4];  // one more: there are no arrays of nothing
#pragma unroll
  for (int s = 0; s < STEPS; s++)
#pragma unroll
    for (int half = 0; half < HALVES; half++) load_b(b[s][half], adapter, row + 16 * half, tile.stop, 16 * s);
  float scales[2];  // of row 8 t + quad
#pragma unroll
  for (int i = 0; i < 2; i++) scales[i] = load_scale(m, tile, code2, row + 8 * (t % (2 * HALVES)) + quad, (column >> 6) + i);
  for (int i = threadIdx.x; i < 16 * 32; i += THREADS) values[i] = __ldg(code + i / 32);
  wait_for_copies<0>();
  __syncthreads();
  const u8* words = shared + COPIES + (warp_row + quad) * WORDS_STRIDE + 4 * t;
  // of eight lanes each: ranks 0 to 7 and 8 to 15 of eight columns, then of the next eight
  const u32 a_rows = begin + HEIGHT * WORDS_STRIDE + (lane & 15) * A_STRIDE + (lane >> 4) * 16;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    if (column + 32 * g >= m.columns) return;
    float sums[HALVES][4][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      u32 a[2][4];
#pragma unroll
      for (int k = 0; k < 2; k++) load_matrices<true>(a[k], a_rows + 16 * s * A_STRIDE + g * 64 + k * 32);
#pragma unroll
      for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          multiply(sums[half][j], b[s][half][0], b[s][half][1], b[s][half][2], b[s][half][3], a[j >> 1][2 * (j & 1)], a[j >> 1][2 * (j & 1) + 1]);
    }
#pragma unroll
    for (int i = 0; i < 2 * HALVES; i++) {
      const float scale = __shfl_sync(~0u, scales[g >> 1], quad * 4 + i);
      const u32 word = *reinterpret_cast<const u32*>(words + 8 * i * WORDS_STRIDE + 16 * g);
      u32 written[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const u32 byte = word >> 8 * j & 255;
        float low = __fmul_rn(values[(byte >> 4) * 32 + lane], scale), high = __fmul_rn(values[(byte & 15) * 32 + lane], scale);
        if constexpr (RANKS != 0) {
          low = fmaf(adapter.scale, sums[i >> 1][j][2 * (i & 1)], low);
          high = fmaf(adapter.scale, sums[i >> 1][j][2 * (i & 1) + 1], high);
        }
        written[j] = round_pair(low, high);
      }
      const int at = row + 8 * i + quad;
      if (at < tile.stop)
        out[(static_cast<u64>(at) * m.columns + column + 32 * g) / 8 + t] = make_uint4(written[0], written[1], written[2], written[3]);
    }
  }
}

// out: [N, K]. BLOCKS: that a processor is to have room for.
#define WRITE_OUT(NAME, RANKS, BLOCKS)                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(                                                     \
      const u8* packed, const u8* absmax, const float* absmax2, const float* code, const float* code2, uint4* out,        \
      const u16* lora_a, const u16* lora_b, int stride, float lora_scale, int rows, int columns, int start1, int start2,  \
      int group1, int group2, float offset0, float offset1, float offset2) {                                              \
    const Matrix m = {packed, absmax, absmax2, rows, columns, start1, start2, group1, group2, offset0, offset1, offset2}; \
    write_out<RANKS>(m, code, code2, {lora_a, lora_b, stride, lora_scale}, out);                                          \
  }
WRITE_OUT(nf4_write_out, 0, 4)
WRITE_OUT(nf4_write_out_16, 16, 3)
WRITE_OUT(nf4_write_out_32, 32, 3)
