"""From run directories to tables, plots and one page; imports of launch only its record and config, never torch."""
