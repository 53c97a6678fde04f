# shellcheck shell=bash disable=SC2034
# Settings of one run for launch/tpu/tpu.sh: copy, fill in, and give with --settings=FILE. A flag on the command line wins.

NAME=stage1                      # of the queued resource; its slices are called the same
PROJECT=my-project
ZONE=us-west4-a
ACCELERATOR=v5litepod-256        # v4-128, v5litepod-256, v5p-128, v6e-256 ... (v4-N and v5p-N count cores, two per chip)
SLICES=1                         # several slices train as one job, over the data-centre network
PROVISIONING=spot                # spot | reserved | on-demand
# RUNTIME=v2-alpha-tpuv5-lite    # chosen from ACCELERATOR when not set

# Every host must see the run's folder and the data: an NFS export (Filestore), or a bucket with hierarchical namespace.
STORAGE=10.0.0.2:/share          # HOST:/EXPORT or gs://BUCKET; empty when the slices mount it by themselves
MOUNT=/mnt/unialign              # where

CONFIG=configs/stage1.py
WORKDIR=/mnt/unialign/runs/stage1
TRAIN_FLAGS=(--config.streams.text_to_image.path=/mnt/unialign/data/text_to_image)

# Passed on to gcloud as they are.
CREATE_FLAGS=()                  # --service-account=... --network=... --internal-ips --valid-until-duration=6h
SSH_FLAGS=()                     # --tunnel-through-iap

POLL=60                          # seconds between two looks at the state
MAX_RESTARTS=5                   # times that a run may fail within half an hour of its start before `keep` gives up
