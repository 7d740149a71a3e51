"""The evidence: the matrix of runs, statistics, the report, the paper's runs as shell files."""
