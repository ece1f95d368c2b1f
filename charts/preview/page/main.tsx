// Draws one dashboard from `window.PREVIEW` (its JSON, and what Prometheus answered to each query) with the components that
// Grafana itself draws panels with. When everything is drawn, the page's title says how many panels could not be.
import React from 'react';
import { createRoot } from 'react-dom/client';
import {
  createTheme,
  dateTime,
  getDisplayProcessor,
  getFieldDisplayValues,
  ThemeContext,
  VizOrientation,
  type DataFrame,
  type TimeRange,
} from '@grafana/data';
import * as ui from '@grafana/ui';
import 'uplot/dist/uPlot.min.css';
import { frames, type Panel, type Series } from './frames';

interface Preview {
  dashboard: { title: string; description: string; panels: Panel[] };
  answers: Record<string, Series[][]>;
  from: number;
  to: number;
  source: string;
}

// Not all of them are in the types of the package.
const { BarGauge, BigValue, GlobalStyles, PanelChrome, Table, TimeSeries } = ui as any;

const preview = (window as any).PREVIEW as Preview;
const theme = createTheme({ colors: { mode: 'dark' } });
const WIDTH = 1600;
const COLUMN = WIDTH / 24;
const ROW = 38;
const HEAD = 56;
const GAP = 4;

const range: TimeRange = {
  from: dateTime(preview.from * 1000),
  to: dateTime(preview.to * 1000),
  raw: { from: 'now-1h', to: 'now' },
};

function Empty({ panel }: { panel: Panel }) {
  return <div data-broken="empty" style={{ padding: 12 }}>{panel.fieldConfig.defaults.noValue ?? 'No data'}</div>;
}

function Values({ panel, data, width, height }: { panel: Panel; data: DataFrame[]; width: number; height: number }) {
  const { options, fieldConfig } = panel;
  const values = getFieldDisplayValues({
    data,
    fieldConfig: fieldConfig as any,
    reduceOptions: options.reduceOptions,
    replaceVariables: (text) => text,
    theme,
    sparkline: panel.type === 'stat' && options.graphMode !== 'none',
    timeZone: 'utc',
  });
  if (panel.type === 'stat') {
    return (
      <div style={{ display: 'flex' }}>
        {values.map((value, place) => (
          <BigValue key={place} value={value.display} sparkline={value.sparkline} width={width / values.length} height={height}
            colorMode={options.colorMode} graphMode={options.graphMode} justifyMode={options.justifyMode} textMode="value"
            theme={theme} />
        ))}
      </div>
    );
  }
  return (
    <>
      {values.map((value, place) => (
        <BarGauge key={place} theme={theme} field={value.field} value={value.display} width={width}
          height={Math.min(height / values.length, 60) - 8} orientation={VizOrientation.Horizontal}
          displayMode={options.displayMode}
          display={value.view?.getFieldDisplayProcessor(value.colIndex!) ?? getDisplayProcessor({ field: { config: value.field } as any, theme })} />
      ))}
    </>
  );
}

function Body({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  const data = frames(panel, preview.answers[panel.id], theme);
  if (!data.some((frame) => frame.length)) {
    return <Empty panel={panel} />;
  }
  switch (panel.type) {
    case 'timeseries':
      return (
        <TimeSeries frames={data} width={width} height={height} timeRange={range} timeZone="utc"
          legend={{ calcs: [], ...panel.options.legend }} options={panel.options} />
      );
    case 'table':
      return <Table data={data[0]} width={width} height={height} />;
    case 'stat':
    case 'bargauge':
      return <Values panel={panel} data={data} width={width} height={height} />;
    default:
      return <div data-broken="type">{panel.type} is not drawn here</div>;
  }
}

// A panel that throws must not take the others with it.
class Guard extends React.Component<React.PropsWithChildren, { error?: Error }> {
  state: { error?: Error } = {};
  static getDerivedStateFromError(error: Error) {
    return { error };
  }
  render() {
    return this.state.error ? <pre data-broken="error">{String(this.state.error.stack)}</pre> : this.props.children;
  }
}

function Page() {
  const { dashboard, source } = preview;
  const height = HEAD + ROW * Math.max(...dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  return (
    <div style={{ position: 'relative', width: WIDTH, height, background: theme.colors.background.canvas, color: theme.colors.text.primary, fontFamily: theme.typography.fontFamily, fontSize: 14 }}>
      <div style={{ padding: 12, whiteSpace: 'nowrap', overflow: 'hidden', textOverflow: 'ellipsis' }}>
        <b>{dashboard.title}</b> <span style={{ color: theme.colors.text.secondary }}>(drawn by @grafana/ui; {source}) {dashboard.description}</span>
      </div>
      {dashboard.panels.map((panel) => {
        const { x, y, w, h } = panel.gridPos;
        const place: React.CSSProperties = { position: 'absolute', left: x * COLUMN + GAP, top: HEAD + y * ROW, width: w * COLUMN - 2 * GAP, height: h * ROW - 2 * GAP };
        if (panel.type === 'row') {
          return <div key={panel.id} style={{ ...place, fontWeight: 500, paddingLeft: 8 }}>{panel.title}</div>;
        }
        return (
          <div key={panel.id} style={place}>
            <PanelChrome title={panel.title} width={place.width} height={place.height}>
              {(width: number, height: number) => <Guard><Body panel={panel} width={width} height={height} /></Guard>}
            </PanelChrome>
          </div>
        );
      })}
    </div>
  );
}

createRoot(document.getElementById('root')!).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles isExtensionsFramed={false} hackNoBackdropBlur={true} />
    <Page />
  </ThemeContext.Provider>
);
setTimeout(() => {
  document.title = `drawn, ${document.querySelectorAll('[data-broken]').length} broken`;
}, 1500);
