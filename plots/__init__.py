"""What is drawn and written up after a run, one script each: report.py (`make r1`'s report), metrics.py (curves of a run), budget.py
(accuracy against tokens spent). They need the [plot] extra; nothing imports them."""
