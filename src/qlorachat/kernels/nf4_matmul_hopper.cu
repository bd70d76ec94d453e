// sums += W x for few rows of x, and the adapters' A x in the same launch, on Hopper (wgmma).
//
// Decoded weights are operand A of wgmma, from registers: a warp has 16 rows. x is operand B, from
// shared memory: it comes tiled, 256 k at a time, by bulk copies into a ring that no barrier of the
// block guards. Blocks share the work as one long list of units, GROUPS * 64 rows by 256 k each, in
// equal runs (stream-K); where a run leaves a row block, its float32 sums are added in global memory.
// The last blocks of the grid multiply x by the 16-bit rows of the adapters' A instead.

#include "nf4.cuh"

constexpr int STAGES = 4;   // of the ring
constexpr int CHUNK = 4;    // blocks of 64 k in a unit

// Tiled x: [K / 64, P, 64] in units of 4 blocks, the last one padded with zeros. In a block, weight j
// is at 16 s + 8 h + 2 t + e, where lane t of a quad decodes it for step s, register half h; 16-byte
// pieces of a row are stored at their place xor the row's last three bits (128-byte swizzle).

template <int P> __device__ __forceinline__ void multiply_tile(float (&d)[P / 2], const u32* a, u64 x, int add);

#if BF16
#define TYPES "bf16.bf16"
#else
#define TYPES "f16.f16"
#endif
#define F(i) "+f"(d[i])
#define F4(i) F(i), F(i + 1), F(i + 2), F(i + 3)
#define F8(i) F4(i), F4(i + 4)
#define F16(i) F8(i), F8(i + 8)
#define WGMMA(P, LIST, A0, A1, A2, A3, X, ADD, ...)                                                      \
  template <>                                                                                          \
  __device__ __forceinline__ void multiply_tile<P>(float (&d)[P / 2], const u32* a, u64 x, int add) {  \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #P   \
                 "k16.f32." TYPES " {" LIST "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #X          \
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

__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra "
      "AGAIN; DONE: }" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void add_pair(float* at, float a, float b) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(a), "f"(b) : "memory");
}

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

template <int P> struct Ring {
  static constexpr int BYTES = CHUNK * P * 128;
  u32 stages, full, empty;  // addresses in shared memory
  __device__ Ring(u32 start) : stages(start), full(start + STAGES * BYTES), empty(full + STAGES * 8) {}
  __device__ void begin(int warps) const {  // by one thread
    for (int s = 0; s < STAGES; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + s * 8) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + s * 8), "r"(warps) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ void fetch(int step, const u8* from) const {  // by one thread
    const u32 s = step % STAGES;
    if (step >= STAGES) wait_barrier(empty + s * 8, (step / STAGES - 1) & 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + s * 8), "r"(BYTES) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            stages + s * BYTES), "l"(from), "r"(BYTES), "r"(full + s * 8) : "memory");
  }
  // The stage as wgmma's descriptor, rows of 128 bytes swizzled. A shuffle tells the compiler that all
  // lanes have the same one: else each product moves its own to uniform registers.
  __device__ u64 wait(int step) const {
    const u32 s = __shfl_sync(~0u, step % STAGES, 0);
    wait_barrier(full + s * 8, (step / STAGES) & 1);
    return (u64(1) << 62) | (u64(64) << 32) | (u64(1) << 16) | (((stages + s * BYTES) & 0x3FFFF) >> 4);
  }
  __device__ void release(int step) const {  // by one lane of each warp
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + (step % STAGES) * 8) : "memory");
  }
};

struct Adapters {
  const u16* a;      // [slots, ranks, K], ranks of all parts
  const u8* b;       // [slots, b_bytes], for whoever reads the sums: it is sent to the L2
  const int* slots;  // of each row of x, from 1; 0 for none
  float* shrunk;     // [M, slots * ranks], added to
  int count, ranks, splits, b_bytes;
};

// One of `shares` of what the reader of the sums will want of B, into the L2.
__device__ __forceinline__ void send_for_b(const Adapters& adapters, int slot, int share, int shares) {
  const u8* b = adapters.b + static_cast<u64>(slot - 1) * adapters.b_bytes;
  const int lines = adapters.b_bytes / 128;
  for (int line = lines * share / shares + threadIdx.x; line < lines * (share + 1) / shares; line += blockDim.x)
    prefetch(b + line * 128);
}

// 16 rows of A and a share of K: every warp its own blocks of 64, sums meet in shared memory. Only
// rows that have the slot are looked at, by eights, and added to; nothing is done where there are none.
template <int P, int WARPS>
__device__ __forceinline__ void shrink(const Adapters& adapters, const u8* x, int x_rows, int columns, int index) {
  constexpr int WORDS = (P + 31) / 32, STRIDE = 20;  // of 32 rows; of 16 ranks: no two lanes share a bank
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane >> 2, t = lane & 3;
  const int group = index / adapters.splits, split = index % adapters.splits, blocks = columns >> 6;
  const int slot = group * 16 / adapters.ranks + 1, stop = blocks * (split + 1) / adapters.splits;
  u64 x_used = 0;  // a bit each
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    const int row = lane + 32 * i;
    const bool used = row < x_rows && __ldg(adapters.slots + row) == slot;
    x_used |= static_cast<u64>(__ballot_sync(~0u, used)) << (32 * i);
  }
  if (!x_used) return;
  const u16* rows = adapters.a + static_cast<u64>(group * 16 + quad) * columns + 16 * ((t & 1) * 2 + (t >> 1));
  auto load = [&](uint4 (&a)[4], int block) {
    if (block >= stop) return;
    const uint4* low = reinterpret_cast<const uint4*>(rows + block * 64);
    const uint4* high = reinterpret_cast<const uint4*>(rows + 8 * columns + block * 64);
    a[0] = __ldg(low); a[1] = __ldg(low + 1); a[2] = __ldg(high); a[3] = __ldg(high + 1);
  };
  float sums[P / 8][4] = {};
  uint4 next[4];
  int block = blocks * split / adapters.splits + warp;
  load(next, block);
  send_for_b(adapters, slot, group % (adapters.ranks / 16) * adapters.splits + split, adapters.ranks / 16 * adapters.splits);
  wait_for_previous();
  for (; block < stop; block += WARPS) {
    const uint4 a[4] = {next[0], next[1], next[2], next[3]};
    load(next, block + WARPS);
#pragma unroll
    for (int c = 0; c < P / 8; c++) {
      if (!(x_used >> (8 * c) & 255)) continue;
      const u32* row = reinterpret_cast<const u32*>(x) + (block * P + c * 8 + quad) * 32 + t;
      u32 b[8];
#pragma unroll
      for (int piece = 0; piece < 8; piece++) b[piece] = row[(piece ^ quad) * 4];
      multiply(sums[c], a[0].x, a[2].x, a[0].y, a[2].y, b[0], b[1]);
      multiply(sums[c], a[0].z, a[2].z, a[0].w, a[2].w, b[2], b[3]);
      multiply(sums[c], a[1].x, a[3].x, a[1].y, a[3].y, b[4], b[5]);
      multiply(sums[c], a[1].z, a[3].z, a[1].w, a[3].w, b[6], b[7]);
    }
  }
  float* partial = reinterpret_cast<float*>(shared);  // [warp][row of x][STRIDE]
#pragma unroll
  for (int c = 0; c < P / 8; c++) {
    float* at = partial + (warp * P + c * 8 + 2 * t) * STRIDE + quad;
    at[0] = sums[c][0]; at[STRIDE] = sums[c][1]; at[8] = sums[c][2]; at[STRIDE + 8] = sums[c][3];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < x_rows * 8; i += WARPS * 32) {
    const int row = i >> 3, rank = 2 * (i & 7);
    if (!(x_used >> row & 1)) continue;
    float2 sum = make_float2(0.f, 0.f);
    for (int w = 0; w < WARPS; w++) {
      const float2 value = *reinterpret_cast<const float2*>(partial + (w * P + row) * STRIDE + rank);
      sum.x += value.x; sum.y += value.y;
    }
    add_pair(adapters.shrunk + row * adapters.count * adapters.ranks + group * 16 + rank, sum.x, sum.y);
  }
}

template <int P, int GROUPS, bool ALIGNED>
__device__ __forceinline__ void nf4_matmul(const Matrix& m, const Adapters& adapters, const u32* pairs,
                                           const float* code2, const u8* x, float* sums, int x_rows,
                                           int product_blocks) {
  constexpr int WARPS = GROUPS * 4, HEIGHT = GROUPS * 64;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, t = lane & 3;
  let_next_start();
  if (static_cast<int>(blockIdx.x) >= product_blocks) {
    shrink<P, WARPS>(adapters, x, x_rows, m.columns, blockIdx.x - product_blocks);
    return;
  }
  const int items = ((m.columns >> 6) + CHUNK - 1) / CHUNK, last_group = m.rows / 16 - 1;
  const long long units = static_cast<long long>((m.rows + HEIGHT - 1) / HEIGHT) * items;
  const int begin = static_cast<int>(units * blockIdx.x / product_blocks);
  const int steps = static_cast<int>(units * (blockIdx.x + 1) / product_blocks) - begin;

  Walk loading(items, begin), computing(items, begin);
  auto find_rows = [&] { return find(m, min(loading.row_block * (HEIGHT / 16) + warp, last_group), lane); };
  Place place = find_rows();
  auto load_next = [&](Tile<CHUNK, ALIGNED>& tile, bool wanted) {
    load(tile, m, place, loading.item * CHUNK, lane, wanted);
    if (loading.next(items)) place = find_rows();
  };
  const TableEntries<WARPS * 32> entries(pairs, code2);
  Tile<CHUNK, ALIGNED> first, second;
  load_next(first, steps > 0);
  load_next(second, steps > 1);
  entries.fill();
  const Ring<P> ring(SHARED_BASE + TABLE);
  int fetching = computing.item;
  auto fetch = [&](int step) {
    if (step >= steps) return;
    ring.fetch(step, x + fetching * Ring<P>::BYTES);
    if (++fetching == items) fetching = 0;
  };
  wait_for_previous();
  if (tid == 0) {
    ring.begin(WARPS);
    for (int s = 0; s < STAGES - 2; s++) fetch(s);
  }
  __syncthreads();

  float total[P / 2] = {}, block_sum[P / 2] = {};
  u32 a[2][16];
  auto decode = [&](const uint4& words, u32 (&into)[16]) {
    const u32 offset = lane * 4;
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const u32 low = s < 2 ? words.x : words.y, high = s < 2 ? words.z : words.w, i = (s & 1) * 2;
      into[4 * s] = look_up(low, offset, i);
      into[4 * s + 1] = look_up(high, offset, i);
      into[4 * s + 2] = look_up(low, offset, i + 1);
      into[4 * s + 3] = look_up(high, offset, i + 1);
    }
  };
  auto leave = [&](int row_block) {
    const int row = row_block * HEIGHT + warp * 16;
    if (row < m.rows) {
      // A lane has two rows of x for one of the weight; with its neighbour it makes that one for two.
      const bool odd = lane & 4;
      const int x_row = 2 * t + (odd ? 1 : 0);
      float* at = sums + static_cast<u64>(x_row) * m.rows + row + (lane >> 3) * 2;
#pragma unroll
      for (int i = 0; i < P / 8; i++, at += 8 * m.rows)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float even_row = total[4 * i + 2 * half], odd_row = total[4 * i + 2 * half + 1];
          const float got = __shfl_xor_sync(~0u, odd ? even_row : odd_row, 4);
          if (8 * i + x_row < x_rows) add_pair(at + 8 * half, odd ? got : even_row, odd ? odd_row : got);
        }
    }
#pragma unroll
    for (int i = 0; i < P / 2; i++) total[i] = 0.f;
  };
  // A unit's first block is decoded beside the last product of the unit before it, and ahead of the
  // loads that then replace that unit: a wait for older loads would include these.
  uint4 words[2];
  auto begin_unit = [&](const Tile<CHUNK, ALIGNED>& tile) {
    exchange(tile, words, 0, t);
    decode(words[0], a[0]);
  };
  auto compute = [&](Tile<CHUNK, ALIGNED>& tile, const Tile<CHUNK, ALIGNED>& following, int step) {
    if (tid == 0) fetch(step + STAGES - 2);
    __syncwarp();
    const u64 stage = ring.wait(step);
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      hold(block_sum);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int s = 0; s < 4; s++) multiply_tile<P>(block_sum, a[j & 1] + 4 * s, stage + j * P * 8 + 2 * s, s > 0);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (j + 1 < CHUNK) {
        if (j & 1) exchange(tile, words, j + 1, t);
        decode(words[(j + 1) & 1], a[(j + 1) & 1]);
      } else {
        begin_unit(following);  // after the last one of nothing
      }
      const u32 offset = lane * 4 + 128;
      const float f0 = __uint_as_float(look_up(tile.scales[0], offset, j)) * tile.groups[0][ALIGNED ? 0 : j] + tile.offset;
      const float f1 = __uint_as_float(look_up(tile.scales[1], offset, j)) * tile.groups[1][ALIGNED ? 0 : j] + tile.offset;
      if (j + 1 == CHUNK) load_next(tile, step + 2 < steps);
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      hold(block_sum);
#pragma unroll
      for (int i = 0; i < P / 8; i++) {
        total[4 * i] += f0 * block_sum[4 * i]; total[4 * i + 1] += f0 * block_sum[4 * i + 1];
        total[4 * i + 2] += f1 * block_sum[4 * i + 2]; total[4 * i + 3] += f1 * block_sum[4 * i + 3];
      }
    }
    if (lane == 0) ring.release(step);
    const int row_block = computing.row_block;
    if (computing.next(items) || step == steps - 1) leave(row_block);
  };
  begin_unit(first);
  for (int step = 0; step < steps; step += 2) {
    compute(first, second, step);
    if (step + 1 < steps) compute(second, first, step + 1);
  }
}

#define INSTANCE(NAME, P, GROUPS, REGISTERS, ALIGNED)                                                   \
  extern "C" __global__ void __maxnreg__(REGISTERS) NAME(                                               \
      const u8* packed, const u8* absmax, const float* absmax2, const u32* pairs, const float* code2,   \
      const u8* x, float* sums, const u16* lora_a, const u8* lora_b, const int* slots,                  \
      float* shrunk, int x_rows, int rows, int columns,                                                 \
      int start1, int start2, int group1, int group2, float offset0, float offset1, float offset2,      \
      int count, int ranks, int splits, int b_bytes, int product_blocks) {                              \
    const Matrix m = {packed, absmax, absmax2, rows, columns, start1, start2,                           \
                      group1, group2, offset0, offset1, offset2};                                       \
    const Adapters adapters = {lora_a, lora_b, slots, shrunk, count, ranks, splits, b_bytes};           \
    nf4_matmul<P, GROUPS, ALIGNED>(m, adapters, pairs, code2, x, sums, x_rows, product_blocks);         \
  }

// 144 registers leave room beside these blocks for those of the kernels between products.
INSTANCE(nf4_matmul_8, 8, 2, 128, true)
INSTANCE(nf4_matmul_16, 16, 2, 128, true)
INSTANCE(nf4_matmul_32, 32, 3, 144, true)
INSTANCE(nf4_matmul_64, 64, 3, 168, true)
INSTANCE(nf4_matmul_8_ragged, 8, 2, 128, false)
INSTANCE(nf4_matmul_16_ragged, 16, 2, 128, false)
INSTANCE(nf4_matmul_32_ragged, 32, 3, 144, false)
INSTANCE(nf4_matmul_64_ragged, 64, 3, 168, false)
