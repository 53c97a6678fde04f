#!/usr/bin/env bash
# From a fresh machine to a picture: environment, tiny data, a short stage-1 run, samples. Needs Python 3.11 or newer, two
# CPU cores and 6 GB of memory. Run again, it goes on from where it was.
#
#   bash launch/quickstart.sh [FOLDER OF THE RUN, default runs/quickstart]
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,5s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "$0")/.."
run=${1:-runs/quickstart}
source launch/environment.sh
make_environment requirements.txt
python launch/prepare_data.py --format=shapes --output=data/shapes
python launch/train.py --config=configs/stage1.py:tiny --workdir="$run"
pictures=("$run"/samples/*.png) captions=("$run"/samples/*.md)
echo "Pictures, real beside generated:  ${pictures[-1]}"
echo "Captions, real beside predicted:  ${captions[-1]}"
echo "Losses and speed:                 $run/metrics.jsonl"
say_how_to_activate
