"""The training methods: each module is one chapter."""
