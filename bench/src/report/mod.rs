//! One run as a page: figures, charts, settings. The page is one file and loads nothing.

mod chart;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::latency::{Quantiles, show_us};
use crate::load::Kind;
use crate::load::outcome::{Direction, Outcome};
use crate::table;
use chart::{Chart, Scale, Series};

const STYLE: &str = include_str!("style.css");

#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("write the report to {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("draw a chart: {0}")]
    Chart(String),
}

/// Writes `index.html` into `dir`, which is made if it is missing. Returns the path of the page.
pub fn write(dir: &Path, outcome: &Outcome) -> Result<PathBuf, ReportError> {
    let page = page(outcome)?;
    let path = dir.join("index.html");
    let written = fs::create_dir_all(dir).and_then(|()| fs::write(&path, page));
    written.map_err(|source| ReportError::Write { path: path.clone(), source })?;
    Ok(path)
}

/// The page as text.
pub fn page(outcome: &Outcome) -> Result<String, ReportError> {
    let title = format!("drava-bench {}", table::kind_name(outcome.kind));
    let mut body = String::new();
    body.push_str(&format!("<header><h1>{title}</h1><p>{}</p></header>", escape(&subtitle(outcome))));
    body.push_str(&format!("<section class=\"cards\">{}</section>", cards(outcome)));
    body.push_str(&verdict(outcome));
    for Figure { caption, legend, drawing } in charts(outcome)? {
        body.push_str(&format!("<figure><figcaption>{caption}<span>{legend}</span></figcaption>{drawing}</figure>"));
    }
    body.push_str(&format!("<section><h2>Latency of each message</h2>{}</section>", latencies(outcome)));
    body.push_str(&format!("<section><h2>Settings</h2>{}</section>", settings(outcome)));
    let Machine { line, commit } = machine(outcome);
    body.push_str(&format!("<footer>{}{}</footer>", escape(&line), escape(&commit)));
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    ))
}

fn subtitle(outcome: &Outcome) -> String {
    let options = &outcome.options;
    let pace =
        options.rate.map_or("as fast as answers come".to_owned(), |rate| format!("{rate:.0} messages/s, on time"));
    let connections = match outcome.kind {
        Kind::Consume => options.consumers(),
        Kind::Produce | Kind::Tail | Kind::Mixed => options.connections,
    };
    format!(
        "{} bytes a message, {} a batch, {}, {} × {}, {pace}; {:.1} s measured",
        options.size,
        options.batch,
        counted(connections.into(), "connection"),
        counted(options.topics.into(), "topic"),
        counted(options.partitions.into(), "partition"),
        outcome.elapsed_s
    )
}

fn counted(count: u64, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

fn cards(outcome: &Outcome) -> String {
    let mut cards = Vec::new();
    let mut direction = |name: &str, direction: &Option<Direction>| {
        let Some(direction) = direction else { return };
        cards.push((format!("{name} rate"), format!("{:.0}", direction.mib_per_s), "MiB/s".to_owned()));
        let (value, unit) = thousands(direction.messages_per_s);
        cards.push((format!("{name} messages"), value, format!("{unit}/s")));
        if 0 < direction.latency.count {
            for (quantile, us) in [("p50", direction.latency.p50_us), ("p99", direction.latency.p99_us)] {
                let shown = show_us(us);
                let (value, unit) = shown.split_once(' ').unwrap_or((&shown, ""));
                cards.push((format!("{name} {quantile}"), value.to_owned(), unit.to_owned()));
            }
        }
    };
    direction("published", &outcome.published);
    direction("delivered", &outcome.delivered);
    if let Some(node) = &outcome.node {
        cards.push(("node CPU".to_owned(), format!("{:.2}", node.cpu_s_per_gib), "s/GiB".to_owned()));
        let mib = node.peak_rss_bytes as f64 / 1048576.0;
        cards.push(("node peak memory".to_owned(), format!("{mib:.0}"), "MiB".to_owned()));
    }
    let card = |(name, value, unit): (String, String, String)| {
        format!("<div class=\"card\"><span>{name}</span><b>{value}</b><i>{unit}</i></div>")
    };
    cards.into_iter().map(card).collect()
}

fn thousands(value: f64) -> (String, &'static str) {
    if 1e6 <= value {
        (format!("{:.2}", value / 1e6), "M")
    } else if 1e4 <= value {
        (format!("{:.0}", value / 1e3), "k")
    } else {
        (format!("{value:.0}"), "")
    }
}

fn verdict(outcome: &Outcome) -> String {
    let class = if outcome.faults() == 0 { "good" } else { "bad" };
    format!("<p class=\"verdict {class}\">{}</p>", escape(&table::verification(outcome)))
}

struct Figure {
    caption: &'static str,
    legend: String,
    drawing: String,
}

impl Figure {
    fn new(caption: &'static str, chart: &Chart, series: &[Series]) -> Result<Figure, ReportError> {
        let legend = Chart::legend(series).map(|(name, color)| format!("<i style=\"color:{color}\">●</i>{name}"));
        Ok(Figure { caption, legend: legend.collect(), drawing: chart.draw(series)? })
    }
}

/// Those of the charts that have something to show.
fn charts(outcome: &Outcome) -> Result<Vec<Figure>, ReportError> {
    let samples = &outcome.samples;
    let over_time = |pick: fn(&crate::load::outcome::Sample) -> f64| -> Vec<(f64, f64)> {
        samples.iter().map(|sample| (sample.at_s, pick(sample))).filter(|point| 0.0 < point.1).collect()
    };
    let mut charts = Vec::new();
    let rates = [
        Series::new("published", over_time(|sample| sample.published_mib_per_s)),
        Series::new("delivered", over_time(|sample| sample.delivered_mib_per_s)),
    ];
    let chart = Chart { x: "seconds", y: "MiB/s", x_scale: Scale::Linear, y_scale: Scale::Linear };
    charts.push(Figure::new("Throughput", &chart, &rates)?);
    let latency = [
        Series::new("publish p50", over_time(|sample| sample.publish_p50_us)),
        Series::new("publish p99", over_time(|sample| sample.publish_p99_us)),
        Series::new("delivery p50", over_time(|sample| sample.delivery_p50_us)),
        Series::new("delivery p99", over_time(|sample| sample.delivery_p99_us)),
    ];
    let chart = Chart { x: "seconds", y: "latency", x_scale: Scale::Linear, y_scale: Scale::Log };
    charts.push(Figure::new("Latency over time", &chart, &latency)?);
    let curve = |direction: &Option<Direction>| -> Vec<(f64, f64)> {
        let points = direction.iter().flat_map(|direction| &direction.curve);
        // The quantile 1 would lie at infinity.
        points
            .filter(|(quantile, _)| *quantile < 1.0)
            .map(|(quantile, us)| (1.0 / (1.0 - quantile), us.max(0.1)))
            .collect()
    };
    let distribution =
        [Series::new("published", curve(&outcome.published)), Series::new("delivered", curve(&outcome.delivered))];
    let chart = Chart { x: "percentile", y: "latency", x_scale: Scale::Percentile, y_scale: Scale::Log };
    charts.push(Figure::new("Latency by percentile", &chart, &distribution)?);
    charts.retain(|figure| !figure.drawing.is_empty());
    Ok(charts)
}

fn latencies(outcome: &Outcome) -> String {
    let mut rows = String::new();
    let directions = [("published", &outcome.published), ("delivered", &outcome.delivered)];
    for (name, direction) in directions {
        let Some(direction) = direction else { continue };
        if direction.latency.count == 0 {
            continue;
        }
        let Quantiles { p50_us, p90_us, p99_us, p99_9_us, p99_99_us, max_us, .. } = direction.latency;
        let cells = [p50_us, p90_us, p99_us, p99_9_us, p99_99_us, max_us].map(|us| format!("<td>{}</td>", show_us(us)));
        rows.push_str(&format!("<tr><th>{name}</th><td>{}</td>{}</tr>", direction.messages, cells.concat()));
    }
    if rows.is_empty() {
        return "<p>Stored messages were read; their age is no latency.</p>".to_owned();
    }
    let header = ["", "messages", "p50", "p90", "p99", "p99.9", "p99.99", "max"].map(|name| format!("<th>{name}</th>"));
    format!("<table><tr>{}</tr>{rows}</table>", header.concat())
}

fn settings(outcome: &Outcome) -> String {
    let value = serde_json::to_value(&outcome.options).unwrap_or_default();
    let given = value.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let rows = given.map(|(name, value)| {
        let value = value.as_str().map_or(value.to_string(), str::to_owned);
        format!("<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(&value))
    });
    format!("<table class=\"settings\">{}</table>", rows.collect::<String>())
}

struct Machine {
    line: String,
    commit: String,
}

fn machine(outcome: &Outcome) -> Machine {
    let commit = &outcome.machine.commit;
    let commit = if commit.is_empty() { String::new() } else { format!(" · commit {commit}") };
    Machine { line: outcome.machine.show(), commit }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
