#!/usr/bin/env bash
# From a fresh machine to pictures and scores: environment, data, a short training, samples, accuracies. The training goes
# on from the weights of the demo model in the package, which were trained much longer (docs/learning.md); add
# --from-scratch to begin with random ones. Needs Python 3.11 or newer, two CPU cores and 6 GB of memory. Run again, it
# goes on from where it was.
#
#   bash launch/quickstart.sh [--from-scratch] [FOLDER OF THE RUN, default runs/quickstart]
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,7s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "$0")/.."
# Of trained weights the last part: at a low rate, for they move the less the better they are.
recipe=(--config.init_from=demo --config.optimizer.learning_rate=3e-4)
if [ "${1:-}" = --from-scratch ]; then recipe=(); shift; fi
run=${1:-runs/quickstart}
source launch/environment.sh
make_environment requirements.txt
python launch/prepare_data.py --format=shapes --output=data/shapes --num-records=10000
python launch/train.py --config=configs/stage1.py:tiny --workdir="$run" "${recipe[@]}"
python launch/evaluate.py shapes --bundle="$run" --output="$run/scores" --overwrite --tasks=text_to_image,caption --scenes=64
pictures=("$run"/samples/*.png) captions=("$run"/samples/*.md)
echo "Pictures, real beside generated:  ${pictures[-1]}"
echo "Captions, real beside predicted:  ${captions[-1]}"
echo "Losses and speed:                 $run/metrics.jsonl"
echo "Accuracies, and the worst scenes: $run/scores"
say_how_to_activate
