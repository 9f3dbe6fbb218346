#!/bin/sh
# Nsight Systems over three training steps and three scored images, as `cpc-fast profile` takes them.
#
#   benchmarks/nsys.sh OUT [RUN]      writes OUT.nsys-rep (open in nsys-ui) and prints four summaries; of the demo's
#                                     model without a RUN
#
#   --trace=cuda,nvtx,cublas,cudnn   kernels and copies, the named ranges, and which library call started what
#   --capture-range=cudaProfilerApi  only the warm steps: compilation and warm-up stay out
#   --cuda-graph-trace=node          kernels inside CUDA graphs one by one, not as one block
#   --cuda-memory-usage=true         a line for the allocator (costs a little time)
#   --sample=none                    no CPU sampling: it needs rights that containers lack
set -eu
out=${1:?usage: benchmarks/nsys.sh OUT [RUN]}
command -v nsys >/dev/null || { echo "nsys.sh: nsys is not on the path; it comes with the CUDA toolkit or from NVIDIA" >&2; exit 2; }
nsys profile --output="$out" --force-overwrite=true --trace=cuda,nvtx,cublas,cudnn --sample=none \
  --capture-range=cudaProfilerApi --capture-range-end=stop --cuda-graph-trace=node --cuda-memory-usage=true \
  cpc-fast profile "${2:---demo}" --nsys
nsys stats --report nvtx_sum,nvtx_gpu_proj_sum,cuda_gpu_kern_sum,cuda_gpu_mem_time_sum "$out.nsys-rep"
