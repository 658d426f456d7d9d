"""tools/metrics.py, report.py and budget.py: what is drawn, and what is refused."""
import json

import pytest

from tools import budget, report
from tools import metrics as plot


@pytest.fixture
def run(tmp_path):
    lines = []
    for i in range(5):
        lines.append({'step': i, 'entropy': 1 / (i + 1), 'flat': 3.0, 'loss': 0.5 ** i,
                      'text': 'no number'})
    lines.append({'step': 4, 'eval_pass1': 0.5})
    cut = '{"step": 5, "lo'   # by a kill
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n' + cut)
    return tmp_path


def test_what_changes_is_drawn_the_important_first(run):
    pytest.importorskip('matplotlib')
    assert plot.main(plot.Config(run=str(run))) == ['loss', 'entropy']
    assert (run / 'metrics.png').stat().st_size > 5000
    two = plot.Config(run=[str(run), str(run)], keys=['flat'], out=str(run / 'b.png'))
    assert plot.main(two) == ['flat'] and (run / 'b.png').exists()


def test_curves_are_averaged_over_the_last_steps(run):
    steps, values = plot.curve(plot.read_metrics(run), 'loss', 2)
    assert steps == [0, 1, 2, 3, 4] and values == pytest.approx([1, 0.75, 0.375, 0.1875, 0.09375])
    gaps = [{'step': 1, 'kl': 1.0}, {'step': 2, 'kl': None}, {'step': 3, 'kl': 3.0}]
    assert plot.curve(gaps, 'kl', 2) == ([1, 3], [1.0, 2.0])


def test_mistakes_are_told(run, tmp_path):
    pytest.importorskip('matplotlib')
    with pytest.raises(ValueError, match='does not exist'):
        plot.main(plot.Config(run=str(tmp_path / 'nowhere')))
    with pytest.raises(SystemExit, match="no 'lozz'"):
        plot.main(plot.Config(run=str(run), keys=['lozz']))


def test_a_report_has_a_dash_where_nothing_is_right_or_wrong(tmp_path):
    pytest.importorskip('matplotlib')
    numbers = {'problems': 4, 'samples': 8, 'judged': 0.5, 'length': 20.0, 'mixing': 0.0}
    (tmp_path / 'zero').mkdir()
    (tmp_path / 'zero' / 'eval.json').write_text(json.dumps({'data/test.jsonl': numbers}))
    (tmp_path / 'zero' / 'metrics.jsonl').write_text('{"step": 1, "reward": 0.5, "length": 20.0}\n')
    report.main(report.Config(run=str(tmp_path)))
    text = (tmp_path / 'report.md').read_text()
    assert '(R1-Zero) | – | – | – | – | – | – | – | 20 | ' in text
    rows = tmp_path / 'judged.jsonl'
    rows.write_text('{"prompt": "Write a poem.", "task": "preference"}\n')
    with pytest.raises(ValueError, match="'preference', which knows no right and wrong"):
        budget.main(budget.Config(run=str(tmp_path), data=str(rows)))
