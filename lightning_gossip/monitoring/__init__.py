"""What a user sees: loggers, the monitor, run folders, event files and the report on them.

May import strategies and everything below, and Lightning. Read ``monitor`` (metrics in training), ``loggers`` and
``run_folder`` (where they go), ``event_files`` (how they are read back), ``report`` and ``report_plots``;
``plan_schemes``, ``plan``, ``plan_inputs`` and ``plan_plots``: what is to be expected before a run.
"""
