#!/usr/bin/env bash
# The table of MIRFlickr: bash flickr.sh [METHOD ...], or bash flickr.sh --demo on the shipped data set.
exec bash "$(dirname "$0")/scripts/reproduce.sh" mirflickr "$@"
