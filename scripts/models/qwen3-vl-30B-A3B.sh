# shellcheck shell=bash
# shellcheck disable=SC2034  # read by the launchers
# The text model of Qwen3-VL-30B-A3B, Instruct and Thinking. The checkpoint's config builds it and must agree.
MODEL_ARGS=(
  --num-layers 48 --hidden-size 2048
  --num-attention-heads 32 --num-query-groups 4 --kv-channels 128
  --vocab-size 151936 --rotary-base 5000000 --norm-epsilon 1e-6
  --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768
  --untie-embeddings-and-output-weights
)
