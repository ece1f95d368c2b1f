// From Prometheus's answers to what Grafana's components draw: data frames with a panel's field configuration applied.
// Grafana does this in its core, which is no library; here is as much of it as the shipped panels use.
import {
  applyFieldOverrides,
  FieldConfigOptionsRegistry,
  FieldType,
  identityOverrideProcessor,
  numberOverrideProcessor,
  standardFieldConfigEditorRegistry,
  thresholdsOverrideProcessor,
  unitOverrideProcessor,
  valueMappingsOverrideProcessor,
  displayNameOverrideProcessor,
  type DataFrame,
  type Field,
  type FieldConfigPropertyItem,
  type GrafanaTheme2,
} from '@grafana/data';

export interface Series {
  metric: Record<string, string>;
  values: Array<[number, string]>;
}

export interface Target {
  refId: string;
  legendFormat?: string;
}

export interface Panel {
  id: number;
  type: 'row' | 'timeseries' | 'stat' | 'bargauge' | 'table';
  title: string;
  description?: string;
  gridPos: { x: number; y: number; w: number; h: number };
  targets?: Target[];
  options?: any;
  fieldConfig: { defaults: any; overrides: any[] };
  transformations?: Array<{ id: string; options: any }>;
}

const PROPERTIES: Record<string, FieldConfigPropertyItem['process']> = {
  unit: unitOverrideProcessor,
  min: numberOverrideProcessor,
  max: numberOverrideProcessor,
  decimals: numberOverrideProcessor,
  displayName: displayNameOverrideProcessor,
  noValue: identityOverrideProcessor,
  thresholds: thresholdsOverrideProcessor,
  mappings: valueMappingsOverrideProcessor,
  color: identityOverrideProcessor,
};

const CUSTOM = [
  'align', 'axisPlacement', 'cellOptions', 'drawStyle', 'fillOpacity', 'hideFrom', 'inspect', 'lineInterpolation',
  'lineWidth', 'pointSize', 'showPoints', 'stacking', 'thresholdsStyle',
];

function item(id: string, process: FieldConfigPropertyItem['process'], isCustom: boolean): FieldConfigPropertyItem {
  const path = isCustom ? id.replace('custom.', '') : id;
  return { id, path, name: id, process, isCustom, settings: {}, shouldApply: () => true, editor: () => null, override: () => null } as any;
}

const standard = Object.entries(PROPERTIES).map(([id, process]) => item(id, process, false));
const custom = CUSTOM.map((name) => item(`custom.${name}`, identityOverrideProcessor, true));
standardFieldConfigEditorRegistry.setInit(() => standard as any);
const registry = new FieldConfigOptionsRegistry(() => [...standard, ...custom] as any);

export function frames(panel: Panel, answers: Series[][], theme: GrafanaTheme2): DataFrame[] {
  const data = (panel.targets ?? []).flatMap((target, place) =>
    panel.type === 'table' ? [table(target, answers[place], panel)] : answers[place].map((series) => line(target, series))
  );
  const { defaults, overrides } = panel.fieldConfig;
  const steps = defaults.thresholds.steps.map((step: any) => ({ ...step, value: step.value ?? -Infinity }));
  const colour = { mode: panel.type === 'timeseries' ? 'palette-classic' : 'thresholds' };
  return applyFieldOverrides({
    data,
    fieldConfig: { defaults: { color: colour, ...defaults, thresholds: { ...defaults.thresholds, steps } }, overrides },
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
    fieldConfigRegistry: registry,
  });
}

function line(target: Target, series: Series): DataFrame {
  const name = (target.legendFormat ?? '').replace(/\{\{(\w+)\}\}/g, (_, label) => series.metric[label] ?? '');
  const value: Field = {
    name: 'Value',
    type: FieldType.number,
    labels: series.metric,
    config: { displayNameFromDS: name },
    values: series.values.map(([, number]) => Number(number)),
  };
  const time: Field = { name: 'Time', type: FieldType.time, config: {}, values: series.values.map(([at]) => at * 1000) };
  return { refId: target.refId, length: series.values.length, fields: [time, value] };
}

// The columns in the order and under the names of the transformation "organize", which every table has.
function table(target: Target, answer: Series[], panel: Panel): DataFrame {
  const { indexByName, renameByName } = panel.transformations![0].options;
  const names = Object.keys(indexByName).sort((a, b) => indexByName[a] - indexByName[b]);
  const fields = names.map((name): Field => {
    const isValue = name === 'Value';
    return {
      name: renameByName[name],
      type: isValue ? FieldType.number : FieldType.string,
      config: {},
      values: answer.map((row) => (isValue ? Number(row.values.at(-1)![1]) : row.metric[name])),
    };
  });
  return { refId: target.refId, length: answer.length, fields };
}
