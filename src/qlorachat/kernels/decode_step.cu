// What comes between the products of a fused decode step, attention apart: the residual stream and
// SwiGLU. A warp has 8 rows, and 16 or 32 columns.

#include "lora_between.cuh"

constexpr int WARPS = 4;  // but for SwiGLU

// Where a lane's columns are in a tiled x: two and, 16 bytes away, two.
template <int TILES> struct Tiled {
  u32 *first[TILES], *second[TILES];
  template <class Place> __device__ __forceinline__ Tiled(u16* x, const Place& at, int padded) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int index = tiled_at(at.row, at.column + COLUMNS * tile, padded);
      first[tile] = hold(reinterpret_cast<u32*>(x + index));
      second[tile] = hold(reinterpret_cast<u32*>(x + (index ^ 8)));
    }
  }
  __device__ __forceinline__ void store(int tile, const u32 (&pairs)[2]) const {
    *first[tile] = pairs[0];
    *second[tile] = pairs[1];
  }
};

// A warp's part of dynamic shared memory, where it has room for pieces of B and of A.
template <int TILES, int PARTS> __device__ __forceinline__ u8* find_pieces(int warp, int b_room, int a_room) {
  return shared + warp * (b_room * PARTS + a_room) * TILES * PIECE;
}

struct Residual {
  u16* h;             // [M, width]
  const u16* weight;  // [width], of the norm that is put off; null: no x and no squares
  u16* x;             // h * weight, tiled
  float* squares;     // [M], of h, added to
  int rows, width, padded;

  // Of four columns. Not __ldg: the compiler would move it behind the wait.
  __device__ __forceinline__ uint2 find_factors(int column) const {
    return weight && column < width ? __ldcg(reinterpret_cast<const uint2*>(weight + column)) : make_uint2(0, 0);
  }
  // The x of two columns of a row; returns the squares' sum.
  __device__ __forceinline__ float multiply(u32 pair, u32 factors, u32& product) const {
    product = round_pair(low_half(pair) * low_half(factors), high_half(pair) * high_half(factors));
    return low_half(pair) * low_half(pair) + high_half(pair) * high_half(pair);
  }
};

struct Squares { float of[WARPS][ROWS]; };  // of a block's columns, by warps

// h of a lane's columns, as it is to be, and all that follows from it.
template <int TILES, int PIECES>
__device__ __forceinline__ void leave(const Residual& residual, const Place<TILES, WARPS>& at, uint2* own,
                                      const Tiled<TILES>& tiled, const uint2 (&h)[TILES], const uint2 (&factors)[TILES],
                                      Shrink<TILES, PIECES>& shrink) {
  const bool inside = at.row < residual.rows && at.column < residual.width;
  u32 x[TILES][2] = {};
  float square = 0.f;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    square += residual.multiply(h[tile].x, factors[tile].x, x[tile][0]);
    square += residual.multiply(h[tile].y, factors[tile].y, x[tile][1]);
    if (!inside) continue;
    if (residual.weight) tiled.store(tile, x[tile]);
    own[4 * tile] = h[tile];
  }
  if (!residual.weight) return;
  square += __shfl_xor_sync(~0u, square, 1);
  square += __shfl_xor_sync(~0u, square, 2);
  __shared__ Squares squares;
  if ((at.lane & 3) == 0) squares.of[at.warp][at.lane >> 2] = square;
  shrink.add(x, [&] {  // by the last warp: the first ones have the first ranks of A x
    const int inner = static_cast<int>(threadIdx.x) - (WARPS * 32 - ROWS), row = blockIdx.y * ROWS + inner;
    if (inner < 0 || row >= residual.rows) return;
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += squares.of[warp][inner];
    atomicAdd(residual.squares + row, sum);
  });
}

template <int TILES, int PIECES>
__device__ __forceinline__ void begin_residual(const long long* ids, const u16* embedding, const Residual& residual,
                                               const Shrinking& adapters, int room) {
  let_next_start();
  const Place<TILES, WARPS> at;
  Shrink<TILES, PIECES> shrink(adapters, at, residual.rows, residual.width, find_pieces<TILES, 0>(at.warp, 0, room), room);
  const Tiled<TILES> tiled(residual.x, at, residual.padded);
  uint2* own = at.template find<uint2>(residual.h, residual.width);
  uint2 h[TILES] = {}, factors[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) factors[tile] = residual.find_factors(at.column + COLUMNS * tile);
  shrink.begin();
  wait_for_previous();
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
    if (at.row < residual.rows && at.column < residual.width)
      h[tile] = __ldg(reinterpret_cast<const uint2*>(embedding + ids[at.row] * residual.width + at.column) + 4 * tile);
  leave(residual, at, own, tiled, h, factors, shrink);
}

template <int TILES, int PIECES>
__device__ __forceinline__ void add_to_residual(float* sums, const Residual& residual, const Expanding& expanding,
                                                int b_room, const Shrinking& shrinking, int a_room) {
  let_next_start();
  const Place<TILES, WARPS> at;
  u8* pieces = find_pieces<TILES, 1>(at.warp, b_room, a_room);
  Expand<TILES, 1, PIECES ? PIECES : TILES == 1 ? 4 : 2, PIECES != 0> expand(expanding, at, residual.rows, residual.width, pieces, b_room);
  Shrink<TILES, PIECES> shrink(shrinking, at, residual.rows, residual.width, pieces + b_room * TILES * PIECE, a_room);
  const Tiled<TILES> tiled(residual.x, at, residual.padded);
  uint2* own = at.template find<uint2>(residual.h, residual.width);
  float4* own_sums = at.template find<float4>(sums, residual.width);
  const bool inside = at.row < residual.rows && at.column < residual.width;
  uint2 factors[TILES], h[TILES] = {};
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) factors[tile] = residual.find_factors(at.column + COLUMNS * tile);
  float4 added[1][TILES] = {};
  if (TILES == 1) shrink.begin();
  expand.add(added, [&] {
#pragma unroll
    for (int tile = 0; inside && tile < TILES; tile++) {
      added[0][tile] = __ldcg(own_sums + 4 * tile);
      h[tile] = __ldcg(own + 4 * tile);
    }
  });
  if (TILES != 1) shrink.begin();
#pragma unroll
  for (int tile = 0; inside && tile < TILES; tile++) {
    own_sums[4 * tile] = make_float4(0.f, 0.f, 0.f, 0.f);
    auto sum = [](u32 old, float low, float high) {
      const u32 added = round_pair(low, high);
      return round_pair(low_half(old) + low_half(added), high_half(old) + high_half(added));
    };
    const float4& four = added[0][tile];
    h[tile] = make_uint2(sum(h[tile].x, four.x, four.y), sum(h[tile].y, four.z, four.w));
  }
  leave(residual, at, own, tiled, h, factors, shrink);
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// gate|up times 1 / rms, rounded; silu(gate) * up tiled. With two tiles and one adapter, warps have the same columns and
// share B, which at rank 16 has as many bytes as the sums of 8 rows.
template <int TILES, int WARPS, int PIECES>
__device__ __forceinline__ void silu_mul(float* sums, const float* squares, u16* x, const Expanding& adapters, int room,
                                         int width, float share, float eps, int rows, int padded) {
  let_next_start();
  constexpr bool STACKED = TILES == 2 && PIECES;
  const Place<TILES, WARPS, STACKED> at;
  u8* pieces = find_pieces<TILES, 2>(STACKED ? 0 : at.warp, room, 0);
  Expand<TILES, 2, PIECES ? PIECES : 2, PIECES != 0, STACKED> expand(adapters, at, rows, width, pieces, room);
  const Tiled<TILES> tiled(x, at, padded);
  float4* own[2] = {at.template find<float4>(sums, 2 * width), at.template find<float4>(sums + width, 2 * width)};
  const float* square = hold(squares + at.row);
  const bool inside = at.row < rows && at.column < width;
  float4 gate_up[2][TILES] = {};
  float squares_of_row = 0.f;
  expand.add(gate_up, [&] {
    if (!inside) return;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int part = 0; part < 2; part++) gate_up[part][tile] = __ldcg(own[part] + 4 * tile);
    squares_of_row = __ldca(square);  // last: all warps of the card ask for it
  });
  if (!inside) return;
  const float factor = inverse_rms(squares_of_row, share, eps);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    own[0][4 * tile] = own[1][4 * tile] = make_float4(0.f, 0.f, 0.f, 0.f);
    auto product = [&](float gate0, float gate1, float up0, float up1) {
      const u32 gate = round_pair(gate0 * factor, gate1 * factor), up = round_pair(up0 * factor, up1 * factor);
      const u32 active = round_pair(silu(low_half(gate)), silu(high_half(gate)));
      return round_pair(low_half(active) * low_half(up), high_half(active) * high_half(up));
    };
    const float4 &gate = gate_up[0][tile], &up = gate_up[1][tile];
    tiled.store(tile, {product(gate.x, gate.y, up.x, up.y), product(gate.z, gate.w, up.z, up.w)});
  }
}

// One block fits beside a product of up to 32 rows.
#define KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)

#define RESIDUAL(NAME, TILES, PIECES)                                                                                  \
  KERNEL begin_residual_##NAME(const long long* ids, const u16* embedding, const u16* weight, u16* x, u16* residual,   \
                               float* squares, const u16* lora_a, const int* lora_slots, float* shrunk, int stride,    \
                               int held, int ranks, int a_room, int rows, int width, int padded) {                     \
    begin_residual<TILES, PIECES>(ids, embedding, {residual, weight, x, squares, rows, width, padded},                 \
                                  {lora_a, lora_slots, shrunk, stride, held, ranks}, a_room);                          \
  }                                                                                                                    \
  KERNEL add_to_residual_##NAME(                                                                                       \
      float* sums, u16* residual, const u16* weight, u16* x, float* squares, const float* lora_shrunk,                 \
      const u16* lora_b, const int* lora_slots, const float* lora_scales, int stride, int held, int ranks, int b_room, \
      const u16* lora_a, const int* next_lora_slots, float* shrunk, int next_stride, int next_held, int next_ranks,    \
      int a_room, int rows, int width, int padded) {                                                                   \
    add_to_residual<TILES, PIECES>(                                                                                    \
        sums, {residual, weight, x, squares, rows, width, padded},                                                     \
        {lora_shrunk, lora_b, lora_slots, lora_scales, stride, held, ranks}, b_room,                                   \
        {lora_a, next_lora_slots, shrunk, next_stride, next_held, next_ranks}, a_room);                                \
  }
// For any adapters, and for rows' only one, of so many ranks.
RESIDUAL(1, 1, 0)
RESIDUAL(1_16, 1, 1)
RESIDUAL(1_32, 1, 2)
RESIDUAL(1_64, 1, 4)
RESIDUAL(2, 2, 0)
RESIDUAL(2_16, 2, 1)
RESIDUAL(2_32, 2, 2)
RESIDUAL(2_64, 2, 4)

// Up to 8 rows of a 7B or 13B model's gate|up are no more blocks of 7 warps than a card like the H100 has processors,
// and with 96 registers these fit beside a product: then all start while it runs.
#define SWIGLU(NAME, TILES, PIECES, WARPS, REGISTERS)                                                                  \
  extern "C" __global__ void __maxnreg__(REGISTERS)                                                                    \
  silu_mul_##NAME(float* sums, const float* squares, u16* x, const float* lora_shrunk, const u16* lora_b,              \
                  const int* lora_slots, const float* lora_scales, int stride, int held, int ranks, int b_room,        \
                  int width, float share, float eps, int rows, int padded) {                                           \
    silu_mul<TILES, WARPS, PIECES>(                                                                                    \
        sums, squares, x, {lora_shrunk, lora_b, lora_slots, lora_scales, stride, held, ranks}, b_room, width, share,   \
        eps, rows, padded);                                                                                            \
  }
SWIGLU(1, 1, 0, 7, 96)
SWIGLU(1_16, 1, 1, 7, 96)
SWIGLU(1_32, 1, 2, 7, 96)
SWIGLU(1_64, 1, 4, 7, 96)
SWIGLU(2, 2, 0, 4, 128)
SWIGLU(2_16, 2, 1, 4, 128)
SWIGLU(2_32, 2, 2, 4, 128)
SWIGLU(2_64, 2, 4, 4, 128)
