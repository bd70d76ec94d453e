// What all sources share. Written without headers, for NVRTC. Numbers of 16 bit are bfloat16.
#pragma once

typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned long long u64;

extern __shared__ __align__(1024) u8 shared[];

// Programmatic dependent launch: the next kernel may start while this one runs, as this one may have
// started while the one before it ran. Nothing that a kernel wrote is touched before the wait.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// BYTES into shared memory, asynchronously; zeros unless `wanted`.
template <int BYTES> __device__ __forceinline__ void copy(u32 to, const void* from, bool wanted = true) {
  const int bytes = wanted ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(bytes), "n"(BYTES) : "memory");
  }
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until of a thread's groups of copies only the last LEFT may be on their way.
template <int LEFT> __device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Until the phase of an mbarrier, at an address in shared memory, has ended.
__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra "
      "AGAIN; DONE: }" ::"r"(barrier), "r"(parity) : "memory");
}

// What a tensor copy knows of a matrix: made by the driver, `cuda_source.TileMap`.
struct __align__(64) TensorMap { u8 opaque[128]; };

// Four matrices of 8 rows by 16 bytes, a row's address a lane: of each, two numbers of row lane / 4, or, TRANSPOSED,
// of column lane / 4.
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(u32 (&of)[4], u32 at) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(of[0]), "=r"(of[1]), "=r"(of[2]), "=r"(of[3]) : "r"(at) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(of[0]), "=r"(of[1]), "=r"(of[2]), "=r"(of[3]) : "r"(at) : "memory");
  }
}

// d [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
