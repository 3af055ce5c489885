#!/usr/bin/env bash
# The whole chain on rendered people: data, texts, training, index, search, metrics, explanations, report.
# Needs neither a key, nor pretrained weights, nor a GPU. Run it again and finished stages are skipped.
#   REIDCTL      the command                (default: reidctl on the PATH)
#   REIDCTL_RUN  where the artifacts go     (default: runs/quickstart)
#   RECIPE       sizes and training         (default: the shipped recipe "quickstart")
set -euo pipefail
REIDCTL="${REIDCTL:-reidctl}"
export REIDCTL_RUN="${REIDCTL_RUN:-runs/quickstart}"
RECIPE="${RECIPE:-quickstart}"
SENTENCE="${SENTENCE:-a woman in a red coat and black trousers}"

"$REIDCTL" data synth --recipe "$RECIPE"
"$REIDCTL" caption    --recipe "$RECIPE" --mllm template
"$REIDCTL" finetune   --recipe "$RECIPE"
"$REIDCTL" index
"$REIDCTL" search "$SENTENCE" --top 8 --save "$REIDCTL_RUN/search.png"
"$REIDCTL" interpret
"$REIDCTL" evaluate
"$REIDCTL" report
