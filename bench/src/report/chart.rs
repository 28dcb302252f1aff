//! Line charts as SVG, on any background.

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::ReportError;
use crate::latency::show_us;

const SIZE: (u32, u32) = (940, 320);
/// Readable on light and on dark paper.
const INK: RGBColor = RGBColor(128, 136, 150);
const COLORS: [RGBColor; 4] =
    [RGBColor(47, 111, 237), RGBColor(240, 124, 40), RGBColor(20, 160, 120), RGBColor(190, 70, 160)];

#[derive(Clone, Debug)]
pub struct Series {
    name: &'static str,
    points: Vec<(f64, f64)>,
}

impl Series {
    pub fn new(name: &'static str, points: Vec<(f64, f64)>) -> Series {
        Series { name, points }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From 0 on.
    Linear,
    /// Microseconds, logarithmic.
    Log,
    /// Logarithmic in 1 / (1 - quantile), labelled with the percentile.
    Percentile,
}

#[derive(Clone, Copy, Debug)]
pub struct Chart {
    pub x: &'static str,
    pub y: &'static str,
    pub x_scale: Scale,
    pub y_scale: Scale,
}

impl Chart {
    /// Names and colours of the lines that [`Chart::draw`] draws, to be written above the drawing.
    pub fn legend(series: &[Series]) -> impl Iterator<Item = (&'static str, String)> {
        let drawn = series.iter().enumerate().filter(|(_, series)| 1 < series.points.len());
        drawn.map(|(index, series)| {
            let RGBColor(red, green, blue) = COLORS[index % COLORS.len()];
            (series.name, format!("#{red:02x}{green:02x}{blue:02x}"))
        })
    }

    /// The drawing; empty when there are no points.
    pub fn draw(&self, series: &[Series]) -> Result<String, ReportError> {
        let drawn: Vec<(usize, &Series)> =
            series.iter().enumerate().filter(|(_, series)| 1 < series.points.len()).collect();
        let points = || drawn.iter().flat_map(|(_, series)| series.points.iter().copied());
        if points().next().is_none() {
            return Ok(String::new());
        }
        let mut x = self.x_scale.range(points().map(|point| point.0));
        if self.x_scale == Scale::Linear {
            // Time ends where the run ended.
            x.1 = points().map(|point| point.0).fold(0.0, f64::max);
        }
        let y = self.y_scale.range(points().map(|point| point.1));
        let mut svg = String::new();
        self.draw_onto(&SVGBackend::with_string(&mut svg, SIZE).into_drawing_area(), &drawn, x, y)
            .map_err(|error| ReportError::Chart(error.to_string()))?;
        Ok(svg)
    }

    fn draw_onto(
        &self,
        area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
        drawn: &[(usize, &Series)],
        x: (f64, f64),
        y: (f64, f64),
    ) -> Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>> {
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).x_label_area_size(40).y_label_area_size(70);
        let mut chart = builder
            .build_cartesian_2d(Axis { scale: self.x_scale, range: x }, Axis { scale: self.y_scale, range: y })?;
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .x_labels(8)
            .y_labels(6)
            .axis_style(INK.mix(0.5))
            .bold_line_style(INK.mix(0.22))
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", 13).into_font().color(&INK))
            .draw()?;
        for (index, series) in drawn {
            let color = COLORS[index % COLORS.len()];
            let points = series.points.iter().copied();
            chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
        }
        area.present()
    }
}

impl Scale {
    fn range(self, values: impl Iterator<Item = f64>) -> (f64, f64) {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
        match self {
            Scale::Linear => (0.0, if 0.0 < high { high * 1.1 } else { 1.0 }),
            Scale::Log => (low * 0.8, high * 1.3),
            Scale::Percentile => (1.0, high.max(10.0)),
        }
    }

    /// Where a value lies, before it is stretched over the pixels.
    fn place(self, value: f64) -> f64 {
        match self {
            Scale::Linear => value,
            Scale::Log | Scale::Percentile => value.max(f64::MIN_POSITIVE).log10(),
        }
    }
}

/// An axis of any of the scales, so that one drawing function does for all.
#[derive(Clone, Copy, Debug)]
struct Axis {
    scale: Scale,
    range: (f64, f64),
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let (low, high) = (self.scale.place(self.range.0), self.scale.place(self.range.1));
        let part = (self.scale.place(*value) - low) / (high - low).max(f64::EPSILON);
        limit.0 + (part * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        let (low, high) = self.range;
        match self.scale {
            Scale::Linear => {
                let step = nice_step((high - low) / hint.max_num_points().clamp(2, 8) as f64);
                (0..).map(|i| f64::from(i) * step).take_while(|value| *value <= high).collect()
            }
            Scale::Log => decades(low, high),
            Scale::Percentile => (0..10).map(|i| 10f64.powi(i)).take_while(|value| *value <= high).collect(),
        }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.range.0..self.range.1
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        match self.scale {
            Scale::Percentile if *value <= 1.0 => "0 %".to_owned(),
            Scale::Percentile => {
                let digits = (value.log10() - 2.0).max(0.0) as usize;
                format!("{:.digits$} %", 100.0 - 100.0 / value)
            }
            Scale::Log => show_us(*value),
            Scale::Linear if value.fract() == 0.0 => format!("{value:.0}"),
            Scale::Linear => format!("{value}"),
        }
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn nice_step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(f64::MIN_POSITIVE).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| least <= step * power);
    step.unwrap_or(10.0) * power
}

/// Powers of ten between the ends; 2 and 5 times those, too, when there are few.
fn decades(low: f64, high: f64) -> Vec<f64> {
    let first = low.max(f64::MIN_POSITIVE).log10().floor() as i32;
    let last = high.max(f64::MIN_POSITIVE).log10().ceil() as i32;
    let steps: &[f64] = if last - first <= 3 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let all = (first..=last).flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
    all.filter(|value| low <= *value && *value <= high).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        assert_eq!(nice_step(0.3), 0.5);
        assert_eq!(nice_step(130.0), 200.0);
        assert_eq!(nice_step(1.0), 1.0);
        assert_eq!(decades(90.0, 1100.0), [100.0, 200.0, 500.0, 1000.0]);
    }

    #[test]
    fn percentiles_are_labelled_as_such() {
        let axis = Axis { scale: Scale::Percentile, range: (1.0, 1e4) };
        let labels: Vec<String> = [1.0, 10.0, 100.0, 1e3, 1e4].iter().map(|value| axis.format_ext(value)).collect();
        assert_eq!(labels, ["0 %", "90 %", "99 %", "99.9 %", "99.99 %"]);
    }

    #[test]
    fn a_chart_without_points_is_empty() {
        let chart = Chart { x: "s", y: "µs", x_scale: Scale::Linear, y_scale: Scale::Log };
        assert_eq!(chart.draw(&[Series::new("nothing", vec![])]).unwrap(), "");
        let svg = chart.draw(&[Series::new("line", vec![(0.0, 5.0), (1.0, 90.0)])]).unwrap();
        assert!(svg.contains("<svg") && svg.contains("50 µs"), "{svg}");
    }
}
