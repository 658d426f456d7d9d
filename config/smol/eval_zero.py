# The same of the control that was trained with R1-Zero's template. Give it after eval.py.
prefill = ' <think>'
stop = ['</answer>']
