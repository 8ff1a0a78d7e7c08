#!/usr/bin/env bash
# The table of MS COCO: bash coco.sh [METHOD ...], or bash coco.sh --demo on the shipped data set.
exec bash "$(dirname "$0")/scripts/reproduce.sh" coco "$@"
