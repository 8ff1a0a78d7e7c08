"""Commands that measure methods: reference rows, parts, rankings."""
