"""What measures: clocks, memory, what a case is, the report and its tables."""
