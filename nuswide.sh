#!/usr/bin/env bash
# The table of NUS-WIDE: bash nuswide.sh [METHOD ...], or bash nuswide.sh --demo on the shipped data set.
exec bash "$(dirname "$0")/scripts/reproduce.sh" nuswide "$@"
