"""The metrics that a task or group reports, and the check of a suite's choice."""

from typing import Any

from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.api.task import ConfigurableTask

from speedstack.eval.lm_eval.task_loading import item_name, leaf_tasks
from speedstack.eval.results.suite import no_metric


def find_metric(item: Any, metric: str) -> str:
    """lm-eval's name, 'metric,filter', of a suite's metric; without a filter it means the only one.

    Raises ValueError, naming the nearest, if the task does not report it or has several filters. For a task with its
    own scoring function, whose metrics are unknown in advance, only the filter is checked.
    """
    known, is_complete = _reported(item)
    if metric in known:
        return metric
    name, comma, filter_name = metric.partition(",")
    filters = list(dict.fromkeys(each.partition(",")[2] for each in known))
    found = [each for each in known if each.partition(",")[0] == name]
    if not comma and not found and not is_complete:
        found = [f"{name},{each}" for each in filters]
    if not comma and len(found) == 1:
        return found[0]
    if not comma and found:
        raise ValueError(f"{item_name(item)} has several of '{metric}': say which, {' or '.join(found)}")
    if is_complete or filter_name not in filters:
        raise ValueError(no_metric(item_name(item), metric, known))
    return metric


def _reported(item: Any) -> tuple[list[str], bool]:
    """'metric,filter' names that lm-eval reports of a task or group, and whether the list is complete."""
    if not hasattr(item, "get_all_tasks"):
        names = [f"{metric},{each.name}" for metric in item.aggregation() for each in item._filters]
        return names, _measures_by_list(item)
    members = [_reported(task) for task in leaf_tasks(item)]
    there = dict.fromkeys(name for names, _ in members for name in names)
    names = [
        name
        for aggregated in item.aggregate_metric_list or ()
        for name in there
        if name.partition(",")[0] == aggregated.metric
        and (aggregated.filter_list is None or name.partition(",")[2] in aggregated.filter_list)
    ]
    return list(dict.fromkeys(names)), not names or all(is_complete for _, is_complete in members)


def _measures_by_list(task: Any) -> bool:
    """Whether a task reports only the metrics it lists, without its own code or multi-value metrics."""
    return (
        type(task).process_results is ConfigurableTask.process_results
        and not callable(task.config.process_results)
        and all(metric in METRIC_REGISTRY for metric in task.aggregation())
    )
