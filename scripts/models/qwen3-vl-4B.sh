# shellcheck shell=bash
# shellcheck disable=SC2034  # read by the launchers
# The text model of Qwen3-VL-4B, Instruct and Thinking. The checkpoint's config builds it and must agree.
MODEL_ARGS=(
  --num-layers 36 --hidden-size 2560 --ffn-hidden-size 9728
  --num-attention-heads 32 --num-query-groups 8 --kv-channels 128
  --vocab-size 151936 --rotary-base 5000000 --norm-epsilon 1e-6
)
