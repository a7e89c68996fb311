"""What a machine makes of the work, known or foretold: compiled kernels (compiling, resources), launches and how long they take
(roofline here; gpus, launches and prediction for a GPU that is not there), the wait before the first picture (ledger)."""
