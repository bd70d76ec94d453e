// sums += W x for few rows of x, and what its adapters ask for beside it, in one launch, on Hopper (wgmma).
//
// Decoded weights are operand A of wgmma, from registers: a warp has 16 rows. x is operand B, from
// shared memory, tiled. One warp brings both, by tensor and bulk copies into two rings that no barrier
// of the block guards; three more see to the adapters. All in bfloat16.
// Blocks share the work as one long list of units, GROUPS * 64 rows by 256 k each, in equal runs
// (stream-K); where a run leaves a row block, its float32 sums are added in global memory.

#include "nf4_matmul.cuh"

constexpr int EARLY = 2;    // units of weights that are asked for before the wait: more would be in the way of the sums
                            // that the kernel before reads
constexpr int HELPERS = 3;  // warps for the adapters
constexpr int AHEAD = 3;    // units of the next product that a block brings to the L2

template <int P> __device__ __forceinline__ void multiply_tile(float (&d)[P / 2], const u32* a, u64 x, int add);

#define F(i) "+f"(d[i])
#define F4(i) F(i), F(i + 1), F(i + 2), F(i + 3)
#define F8(i) F4(i), F4(i + 4)
#define F16(i) F8(i), F8(i + 8)
#define WGMMA(P, LIST, A0, A1, A2, A3, X, ADD, ...)                                                      \
  template <>                                                                                          \
  __device__ __forceinline__ void multiply_tile<P>(float (&d)[P / 2], const u32* a, u64 x, int add) {  \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #P   \
                 "k16.f32.bf16.bf16 {" LIST "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #X          \
                 ", p, 1, 1, 0; }"                                                                     \
                 : __VA_ARGS__                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(add));                      \
  }
#define L4 "%0, %1, %2, %3"
#define L8 L4 ", %4, %5, %6, %7"
#define L16 L8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define L32 L16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
WGMMA(8, L4, 4, 5, 6, 7, 8, 9, F4(0))
WGMMA(16, L8, 8, 9, 10, 11, 12, 13, F8(0))
WGMMA(32, L16, 16, 17, 18, 19, 20, 21, F16(0))
WGMMA(64, L32, 32, 33, 34, 35, 36, 37, F16(0), F16(16))

// Registers that a wgmma in flight uses: nothing may be moved across this.
template <int COUNT> __device__ __forceinline__ void hold(float (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(values[i])::"memory");
}

// Stages that one thread has filled and warps take; steps count from 0.
template <int STAGES> struct Ring {
  u32 full, empty;  // mbarriers of the stages
  __device__ Ring(u32 at) : full(at), empty(at + STAGES * 8) {}
  __device__ void begin(int warps) const {  // by one thread
    for (int s = 0; s < STAGES; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + s * 8) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + s * 8), "r"(warps) : "memory");
    }
  }
  // Waits until the stage is free; the barrier that copies of `bytes` in all report to. By one thread.
  __device__ u32 announce(int step, int bytes) const {
    const u32 s = step % STAGES;
    if (step >= STAGES) wait_barrier(empty + s * 8, (step / STAGES - 1) & 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + s * 8), "r"(bytes) : "memory");
    return full + s * 8;
  }
  __device__ void wait(int step) const { wait_barrier(full + step % STAGES * 8, (step / STAGES) & 1); }
  __device__ void release(int step) const {  // by one lane of each warp
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + step % STAGES * 8) : "memory");
  }
};

__device__ __forceinline__ void copy_bytes(u32 to, const u8* from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// A box of 64 rows by 128 bytes, swizzled; zeros past the edges.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int byte, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(byte), "r"(row), "r"(barrier) : "memory");
}

// The same, to the L2 alone.
__device__ __forceinline__ void prefetch_bytes(const u8* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void prefetch_box(const TensorMap* map, int byte, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(byte), "r"(row) : "memory");
}

// A block's dynamic shared memory; addresses and sizes in bytes.
template <int P, int GROUPS> struct Layout {
  static constexpr int WARPS = GROUPS * 4, HEIGHT = GROUPS * 64;  // of the product
  static constexpr int W_STAGES = P == 8 ? 3 : 2, X_STAGES = 3;  // of the rings
  static constexpr int X_BYTES = CHUNK * P * 128;
  static constexpr int W_BYTES = HEIGHT * 128, SCALE_BYTES = HEIGHT * CHUNK;
  static constexpr u32 X = SHARED_BASE + TABLE, W = X + X_STAGES * X_BYTES, SCALES = W + W_STAGES * W_BYTES;
  static constexpr u32 BARRIERS = SCALES + W_STAGES * SCALE_BYTES;
};

// The weight of the product that follows. Memory has nothing to do until then: its first units come to the L2.
struct Ahead {
  const TensorMap* packed;
  const u8* absmax;
  int rows, columns;  // 0 if there is none

  template <int HEIGHT> __device__ __forceinline__ void look() const {
    const Share share(rows, columns, HEIGHT);
    Walk walk(max(share.items, 1), share.begin);
    for (int step = 0; step < min(AHEAD, share.steps); step++) {
      const int row = walk.row_block * HEIGHT;
      for (int g = 0; g < HEIGHT / 64; g++) prefetch_box(packed, walk.item * 128, row + g * 64);
      prefetch_bytes(absmax + (static_cast<u64>(walk.item) * rows + row) * CHUNK, min(HEIGHT, rows - row) * CHUNK);
      walk.next(share.items);
    }
  }
};

// Weights and x of a block's steps, by one thread. Weights are there for any kernel: only x waits.
template <int P, int GROUPS> struct Producer {
  using L = Layout<P, GROUPS>;
  const TensorMap* packed;
  const Matrix& m;
  const u8* x;
  const Ring<L::W_STAGES>& weights;
  const Ring<L::X_STAGES>& rows;
  const int items, steps;
  Walk walk;
  int x_item;

  __device__ __forceinline__ void fetch_weights(int step) {
    if (step >= steps) return;
    const int row = walk.row_block * L::HEIGHT, stage = step % L::W_STAGES, scales = min(L::HEIGHT, m.rows - row) * CHUNK;
    const u32 barrier = weights.announce(step, L::W_BYTES + scales);
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
      copy_box(L::W + stage * L::W_BYTES + g * 8192, packed, walk.item * 128, row + g * 64, barrier);
    copy_bytes(L::SCALES + stage * L::SCALE_BYTES, find_absmax(m, row, walk.item), scales, barrier);
    walk.next(items);
  }
  __device__ __forceinline__ void fetch_x(int step) {
    const u32 barrier = rows.announce(step, L::X_BYTES);
    copy_bytes(L::X + step % L::X_STAGES * L::X_BYTES, x + x_item * L::X_BYTES, L::X_BYTES, barrier);
    if (++x_item == items) x_item = 0;
  }
};

// A warpgroup gives registers of its threads away, or takes such; 0: neither.
template <bool TAKES, int COUNT> __device__ __forceinline__ void move_registers() {
  if constexpr (COUNT != 0 && TAKES) { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
  if constexpr (COUNT != 0 && !TAKES) { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
}

// OWN, OTHERS: registers of the product's threads and of the others, where they differ.
template <int P, int GROUPS, int OWN, int OTHERS, bool ALIGNED>
__device__ __forceinline__ void nf4_matmul(const TensorMap* packed, const Matrix& m, const Beside& beside, const Ahead& ahead,
                                           const u32* pairs, const float* code2, const u8* x, float* sums, int x_rows) {
  using L = Layout<P, GROUPS>;
  const int lane = find_lane(), warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0), t = lane & 3;
  let_next_start();
  const Share share(m.rows, m.columns, L::HEIGHT);
  const int items = share.items, begin = share.begin, steps = share.steps;
  const Ring<L::W_STAGES> weights(L::BARRIERS);
  const Ring<L::X_STAGES> rows(L::BARRIERS + L::W_STAGES * 16);

  if (warp >= L::WARPS) {
    move_registers<false, OTHERS>();
    if (warp > L::WARPS) {
      __syncthreads();
      beside.template add<P>(m, x, sums, x_rows, blockIdx.x * HELPERS + warp - L::WARPS - 1, gridDim.x * HELPERS);
      return;
    }
    Producer<P, GROUPS> producer = {packed, m, x, weights, rows, items, steps, Walk(items, begin), begin % items};
    if (lane == 0) {
      weights.begin(L::WARPS);
      rows.begin(L::WARPS);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      for (int s = 0; s < EARLY; s++) producer.fetch_weights(s);
    }
    __syncthreads();
    if (lane == 0) {
      wait_for_previous();
      for (int s = 0; s < steps; s++) {
        producer.fetch_x(s);
        for (int late = EARLY; s == 0 && late < L::W_STAGES; late++) producer.fetch_weights(late);
        producer.fetch_weights(s + L::W_STAGES);
        if (P <= 16 && s == max(steps - L::W_STAGES, 0)) ahead.look<L::HEIGHT>();  // with more rows it gains nothing
      }
    }
    return;
  }

  move_registers<true, OWN>();
  // Lane 4 g + t of a warp has rows 2 (g % 4) + g / 4 and 8 further: no two of 16 lanes then share a bank.
  const int last_group = m.rows / 16 - 1, own_row = (lane >> 2 & 3) * 2 + (lane >> 4);
  Walk computing(items, begin), loading(items, begin);
  int group;
  Part part;
  auto find_rows = [&] {
    group = min(loading.row_block * (L::HEIGHT / 16) + warp, last_group);
    part = find_part(m, group * 16);
  };
  find_rows();
  Scales<ALIGNED> scales, next_scales;
  scales.load(m, part, group * 16 + own_row, loading.item);
  TableEntries<L::WARPS * 32>(pairs, code2).template fill<true>();
  __syncthreads();

  const u32 own_bytes = warp * 2048 + own_row * 128 + ((t >> 1 ^ own_row) << 4) + (t & 1) * 8;
  const u32 own_scales = (warp * 16 + own_row) * 4;
  uint2 words[CHUNK][2];  // of the blocks of a unit, of a lane's two rows
  u32 absmax[2], next_absmax[2];
  auto take = [&](int step, u32 (&into)[2]) {
    weights.wait(step);
    const int stage = step % L::W_STAGES;
    const u32 at = stage * L::W_BYTES + own_bytes;
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) words[j][half] = load_pair<L::W>((at ^ j << 5) + half * 1024);
#pragma unroll
    for (int half = 0; half < 2; half++) into[half] = load_word<L::SCALES>(stage * L::SCALE_BYTES + own_scales + half * 32);
    __syncwarp();
    if (lane == 0) weights.release(step);
  };
  float total[P / 2] = {}, block_sum[P / 2] = {};
  u32 a[2][16];
  auto leave = [&](int row_block) {
    const int row = row_block * L::HEIGHT + warp * 16;
    if (row < m.rows) {
      // A lane has two rows of x for one of the weight; with its neighbour it makes that one for two.
      const bool odd = lane & 16;
      const int x_row = 2 * t + (odd ? 1 : 0);
      float* at = sums + static_cast<u64>(x_row) * m.rows + row + (lane >> 2 & 3) * 2;
#pragma unroll
      for (int i = 0; i < P / 8; i++, at += 8 * m.rows)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float even_row = total[4 * i + 2 * half], odd_row = total[4 * i + 2 * half + 1];
          const float got = __shfl_xor_sync(~0u, odd ? even_row : odd_row, 16);
          if (8 * i + x_row < x_rows) add_pair(at + 8 * half, odd ? got : even_row, odd ? odd_row : got);
        }
    }
#pragma unroll
    for (int i = 0; i < P / 2; i++) total[i] = 0.f;
  };

  if (steps > 0) {
    take(0, absmax);
    decode(words[0], lane, a[0]);
  }
  wait_for_previous();
  for (int step = 0; step < steps; step++) {
    const bool more = step + 1 < steps;
    if (more) {
      if (loading.next(items)) find_rows();
      next_scales.load(m, part, group * 16 + own_row, loading.item);
    }
    rows.wait(step);
    // wgmma's descriptor: rows of 128 bytes, swizzled. A shuffle tells the compiler that all lanes have the
    // same one: else each product moves its own to uniform registers.
    const u32 x_at = __shfl_sync(~0u, L::X + step % L::X_STAGES * L::X_BYTES, 0);
    const u64 stage = (u64(1) << 62) | (u64(64) << 32) | (u64(1) << 16) | ((x_at & 0x3FFFF) >> 4);
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      hold(block_sum);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int s = 0; s < 4; s++) multiply_tile<P>(block_sum, a[j & 1] + 4 * s, stage + j * P * 8 + 2 * s, s > 0);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      float factors[2];  // absmax of a lane's two rows
#pragma unroll
      for (int half = 0; half < 2; half++) factors[half] = scales.template factor<true>(absmax, half, j, lane);
      if (j + 1 < CHUNK) {
        decode(words[j + 1], lane, a[(j + 1) & 1]);
      } else if (more) {
        take(step + 1, next_absmax);
        decode(words[0], lane, a[0]);
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      hold(block_sum);
#pragma unroll
      for (int i = 0; i < P / 2; i++) total[i] += factors[i >> 1 & 1] * block_sum[i];
    }
    if (lane == 0) rows.release(step);
    const int row_block = computing.row_block;
    if (computing.next(items) || !more) leave(row_block);
    absmax[0] = next_absmax[0]; absmax[1] = next_absmax[1];
    scales = next_scales;
  }
}

#define INSTANCE(NAME, P, GROUPS, REGISTERS, OWN, OTHERS, ALIGNED)                                  \
  extern "C" __global__ void __maxnreg__(REGISTERS) NAME(                                           \
      const __grid_constant__ TensorMap packed, const u8* absmax, const float* absmax2,             \
      const u32* pairs, const float* code2, const u8* x, float* sums, const u16* lora_a,            \
      float* shrunk, const u16* lora_b, const int* lora_slots, const float* lora_scales,            \
      int stride, int held, int ranks, int x_rows, int rows, int columns, int start1, int start2,   \
      int group1, int group2, float offset0, float offset1, float offset2,                          \
      const __grid_constant__ TensorMap ahead_packed, const u8* ahead_absmax, int ahead_rows,       \
      int ahead_columns) {                                                                          \
    const Matrix m = {nullptr, absmax, absmax2, rows, columns, start1, start2,                      \
                      group1, group2, offset0, offset1, offset2};                                   \
    const Beside beside = {lora_a, shrunk, lora_b, lora_slots, lora_scales, stride, held, ranks};   \
    const Ahead ahead = {&ahead_packed, ahead_absmax, ahead_rows, ahead_columns};                   \
    nf4_matmul<P, GROUPS, OWN, OTHERS, ALIGNED>(&packed, m, beside, ahead, pairs, code2, x, sums,   \
                                                x_rows);                                            \
  }

INSTANCE(nf4_matmul_8, 8, 3, 80, 0, 0, true)
INSTANCE(nf4_matmul_16, 16, 3, 80, 0, 0, true)
INSTANCE(nf4_matmul_32, 32, 3, 96, 0, 0, true)
INSTANCE(nf4_matmul_64, 64, 3, 128, 144, 80, true)
INSTANCE(nf4_matmul_8_ragged, 8, 3, 96, 0, 0, false)
INSTANCE(nf4_matmul_16_ragged, 16, 3, 104, 0, 0, false)
INSTANCE(nf4_matmul_32_ragged, 32, 3, 112, 0, 0, false)
INSTANCE(nf4_matmul_64_ragged, 64, 3, 128, 144, 80, false)
